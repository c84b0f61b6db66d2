"""The documentation's commands exist, take the options they are shown with, and (README.md's) work."""

import re
import shutil

import click
import pytest

from tests.demo.commands import DOCUMENTS, FOREIGN, check_make, click_command, commands_in, parse
from tests.demo.running import ROOT
from tests.models import random_tensors, write_state_spaces
from tmexport.model import mamba2_model

EVERY = [
    pytest.param(words, id=f"{document.relative_to(ROOT)}: {' '.join(words)}"[:100])
    for document in DOCUMENTS
    for words in commands_in(document)
]


@pytest.mark.parametrize("words", EVERY)
def test_command_is_real(words):
    if words[0] == "make":
        check_make(words)
    elif words[0] not in FOREIGN:
        parse(*click_command(words))


@pytest.mark.parametrize(
    "line",
    [
        "tmexport ggufs a b",
        "tmexport gguf a b --typo f16",
        "tmexport gguf a b --type q5_k",
        "tmexport verify a",
        "python -m qat.train --data a --out b --steps many",
        "python -m runtime_ref.generate a.gguf --promt x",
        "python scripts/demo/demo.py --scale huge",
    ],
)
def test_wrong_commands_are_noticed(line):
    with pytest.raises(click.UsageError):
        parse(*click_command(line.split()))


@pytest.mark.parametrize("line", ["make deom", "make test PYTHONZ=3"])
def test_wrong_make_commands_are_noticed(line):
    with pytest.raises(AssertionError, match="the Makefile has no"):
        check_make(line.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_resolve(document):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_readme_commands_run(demo, tmp_path, monkeypatch, capfd):
    """All of README.md's commands in order, in a folder as it is after `make demo`, trainings cut to two steps."""
    assert demo.code == 0, demo.stderr
    shutil.copytree(demo.out, tmp_path / "demo_out")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=4096, d_state=64)
    write_state_spaces(tmp_path / "mamba2-130m", config, random_tensors(config), 4096)
    shutil.copy(demo.out / "teacher" / "tokenizer.json", tmp_path / "mamba2-130m")
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "2", "--seq-len", "32", "--batch-size", "1", "--eval-tokens", "512"]
    ran = 0
    for words in commands_in(ROOT / "README.md"):
        if words[0] == "make" or words[0] in FOREIGN:
            continue
        command, args = click_command(words)
        if "qat.train" in words:
            args += short
        if "--from-scratch" in words:
            args += ["--d-model", "256", "--n-layer", "1", "--vocab-size", "320"]
        code = command.main(args, standalone_mode=False)
        printed = capfd.readouterr()
        assert code in (None, 0), f"{' '.join(words)}: {printed.err}"
        assert printed.out.strip(), f"{' '.join(words)} printed nothing"
        ran += 1
    assert ran >= 15
    assert (tmp_path / "model.gguf").read_bytes() == (demo.out / "student.gguf").read_bytes()
    for name in (
        "small.gguf",
        "teacher-f16.gguf",
        "mamba2-f16.gguf",
        "mamba2-ternary.gguf",
        "my-student",
        "my-rounded",
    ):
        assert (tmp_path / name).exists()
