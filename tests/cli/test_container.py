"""The Containerfile: what it copies is here and let through, what it runs are our commands. It was built with buildah (docs/serve.md)."""

import re
import shlex

from tests.demo.running import ROOT
from tmexport.cli import VERBS

TEXT = (ROOT / "Containerfile").read_text(encoding="utf-8")


def test_what_it_copies_is_there_and_not_ignored():
    let_through = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    copied = [name for line in re.findall(r"^COPY (?!--)(.*) \S+$", TEXT, re.MULTILINE) for name in line.split()]
    assert set(copied) == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_everything_that_is_installed_is_copied():
    """A package of pyproject.toml that the image lacks would fail there only."""
    packages = re.search(r"^include = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for name in re.findall(r'"(\w+)\*"', packages):
        assert f"COPY {name} /source/{name}\n" in TEXT


def test_it_runs_our_verbs():
    entry = re.search(r"^ENTRYPOINT \[(.*)\]\nCMD \[(.*)\]", TEXT, re.MULTILINE)
    words = [word.strip(' "') for part in entry.groups() for word in part.split(",")]
    assert words[0] == "tmexport"
    assert words[1] in VERBS
    built = shlex.split(re.search(r"/tmexport (generate .*) \|\|", TEXT)[1])
    assert built[0] in VERBS
    assert re.search(r"^USER \d+:\d+$", TEXT, re.MULTILINE)
