"""The command itself, interrupted, killed and in odd surroundings: whole files or none, and one line that says why."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hostile.builders import checkpoint
from tests.hostile.expecting import OLD, names
from tests.models import SMALL, write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.gguf.export import plan_export

ROOT = Path(__file__).resolve().parents[2]

SLOW = """
import sys, time
import tmexport.gguf.export as export
real, calls = export.encode_values, []
def slow(*arguments):
    calls.append(1)
    if len(calls) == 3:
        print("in the middle", flush=True)
        time.sleep(60)
    return real(*arguments)
export.encode_values = slow
from tmexport.cli import main
sys.argv = ["tmexport", "gguf", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("number", "code", "text"), [
    (signal.SIGINT, 130, "interrupted; no file was left half written\n"), (signal.SIGTERM, 143, "terminated; no file was left half written\n")])  # fmt: skip
def test_interrupted_in_the_middle(folder, tmp_path_factory, number, code, text):
    source = checkpoint(tmp_path_factory.mktemp("source"))
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, folder / "m.gguf"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == "in the middle\n":
            break
    assert len(names(folder)) == 2  # the temporary file is there
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.endswith(text)
    assert "Traceback" not in errors
    assert names(folder) == ["m.gguf"]
    assert (folder / "m.gguf").read_bytes() == OLD


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    program = "from tmexport.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *map(os.fspath, arguments)], cwd=ROOT, text=True, capture_output=True, check=False, **options)  # fmt: skip


def test_the_command_never_overwrites_the_checkpoint_it_reads(tmp_path):
    folder = checkpoint(tmp_path / "ckpt")
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    for output in (folder / "model.safetensors", folder / "config.json", tmp_path / "link"):
        done = command("gguf", folder, output)
        assert done.returncode == 2
        assert (
            done.stderr.splitlines()[-1]
            == f"error: {output}: is a file of the checkpoint itself; name another file to write"
        )
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_a_refused_file_is_one_line_whatever_it_is_called(tmp_path):
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/[red]\xff\x1b[2J\n.gguf")
    Path(bad).write_bytes(b"GGML" + bytes(100))
    done = command("inspect", bad)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert "starts with b'GGML'; expected b'GGUF'" in done.stderr
    good = os.fsdecode(os.fsencode(tmp_path) + b"/[/bold]\xff.gguf".replace(b"/b", b"b"))
    done = command("gguf", checkpoint(tmp_path / "ckpt\udcff[x]"), good)
    assert done.returncode == 0, done.stderr
    for check in (("inspect", good), ("inspect", good, "--json"), ("verify", tmp_path / "ckpt\udcff[x]", good)):
        done = command(*check)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_an_output_that_cannot_be_written(tmp_path):
    folder, output = checkpoint(tmp_path / "ckpt"), tmp_path / "m.gguf"
    for arguments in (("inspect", folder), ("inspect", folder, "--json"), ("gguf", folder, output)):
        with open("/dev/full", "w") as full:
            program = "from tmexport.cli import main; main()"
            done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE, check=False)  # fmt: skip
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
        assert (done.returncode, lines) == (1, ["error: the output cannot be written: No space left on device"])
    assert names(tmp_path) == ["ckpt"]


def test_the_same_checkpoint_gives_the_same_bytes_in_every_process(tmp_path):
    """Hash seeds, time zones, locales, working folders and umasks must not reach the file."""
    folder, digests = write_small(tmp_path / "ckpt", SMALL, 256), set()
    for number, (seed, zone, locale) in enumerate(
        (("0", "UTC", "C"), ("1", "Asia/Tokyo", "C.UTF-8"), ("random", "America/Lima", "POSIX"))
    ):
        output = tmp_path / f"{number}.gguf"
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "TZ": zone,
            "LC_ALL": locale,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(number + 1),
        }
        done = command("gguf", folder, output, "--json", env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    plan_export(open_checkpoint(folder)).write(tmp_path / "here.gguf", lambda t: None)
    digests.add(hashlib.sha256((tmp_path / "here.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_random_kills_of_the_command(tmp_path):
    """Three of the fifty that scripts/faults/kill.py does."""
    folder, output, rng = write_small(tmp_path / "ckpt", SMALL, 256), tmp_path / "m.gguf", random.Random(0)
    began = time.monotonic()
    assert command("gguf", folder, output).returncode == 0
    whole, duration = output.read_bytes(), time.monotonic() - began
    output.write_bytes(OLD)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", "from tmexport.cli import main; main()", "gguf", folder, output], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        process.kill()
        process.wait()
        assert output.read_bytes() in (OLD, whole)
