"""scripts/machines/logit_hashes.py: its digest is the specification's. scripts/machines/arm64_check.sh: what it says when something is missing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime_ref.arithmetic import PRESETS
from runtime_ref.gguf_source import gguf_source
from runtime_ref.kernels.isa import available
from runtime_ref.reference import ReferenceModel
from runtime_ref.weights import load_weights
from scripts.machines.logit_hashes import logit_hashes
from tests.models import SMALL, write_small
from tmexport.cli import cli

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashes")
    write_small(folder / "checkpoint", SMALL, 256)
    arguments = ["gguf", str(folder / "checkpoint"), str(folder / "m.gguf"), "--embedding-type", "q8_0"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    return folder / "m.gguf"


def specified_digest(path, profile):
    model = ReferenceModel(load_weights(gguf_source(path)), profile)
    state, digest = model.new_state(), hashlib.sha256()
    for i in range(256):
        logits = model.step(state, (7919 * i + 11) % SMALL.vocab_size)
        digest.update(logits.tobytes())
    for _ in range(64):
        logits = model.step(state, int(logits.argmax()))
        digest.update(logits.tobytes())
    return digest.hexdigest()


def test_every_set_has_the_specification_s_digest(gguf, monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", "")
    done = CliRunner().invoke(logit_hashes, [str(gguf)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agree"]
    assert found["model_sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert found["hashes"] == {p: dict.fromkeys(available(), specified_digest(gguf, p)) for p in PRESETS}


def test_two_sets_that_disagree_end_with_code_1(gguf, monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", "")
    monkeypatch.setattr("scripts.machines.logit_hashes.available", lambda: ["avx2", "portable"])
    monkeypatch.setattr("scripts.machines.logit_hashes.measure", lambda source, profile, isa: isa)
    done = CliRunner().invoke(logit_hashes, [str(gguf)])
    assert done.exit_code == 1
    assert not json.loads(done.stdout.splitlines()[-1])["agree"]


def arm64_check(*arguments, **environment):
    command = ["/bin/bash", str(ROOT / "scripts" / "machines" / "arm64_check.sh"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment
    )


def test_arm64_check_says_what_is_missing(gguf, tmp_path):
    assert arm64_check("--help").returncode == 0
    assert "Usage: scripts/machines/arm64_check.sh CACHE MODEL.gguf" in arm64_check().stdout
    absent = arm64_check(tmp_path / "cache", tmp_path / "no.gguf")
    assert absent.returncode == 2
    assert absent.stderr.strip() == f"error: {tmp_path / 'no.gguf'}: no such file; expected a GGUF file"
    bare = tmp_path / "bin"  # the tools that the script has used by then, and no others
    bare.mkdir()
    for name in ("sed", "dirname", "realpath"):
        (bare / name).symlink_to(shutil.which(name))
    tools = arm64_check(tmp_path / "cache", gguf, PATH=str(bare), PYTHON=sys.executable)
    assert tools.returncode == 2
    assert "is not installed; on Debian: apt-get install debootstrap qemu-user-static" in tools.stderr
    assert not (tmp_path / "cache").exists()
