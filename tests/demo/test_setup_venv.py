"""When the Makefile's environment is reused, and when it is not; nothing is installed here."""

import re
import subprocess
import sys

import pytest

from scripts import setup_venv
from tests.demo.running import ROOT


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A bare virtual environment with the stamp that a finished set-up leaves."""
    folder = tmp_path_factory.mktemp("checkout") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "tmexport.stamp").write_text(setup_venv.wanted_stamp(folder), encoding="utf-8")
    return folder


def set_up(folder):
    command = [sys.executable, "scripts/setup_venv.py", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_finished_environment_is_reused_at_once(venv):
    before = sorted(venv.rglob("*"))
    done = set_up(venv)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(venv.rglob("*")) == before


def test_what_is_installed_for_development_serves_the_demo_and_not_the_reverse(venv):
    assert setup_venv.SERVED_BY["demo"] == ("demo", "dev")
    command = [sys.executable, "scripts/setup_venv.py", str(venv)]
    done = subprocess.run([*command, "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert setup_venv.wanted_stamp(venv, "demo") not in (
        setup_venv.wanted_stamp(venv),
        setup_venv.wanted_stamp(venv, "lowest"),
    )
    done = subprocess.run([*command, "all"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "all: is no set of dependencies; expected demo, dev, lowest\n")


def test_stamp_names_all_that_it_depends_on(venv, tmp_path, monkeypatch):
    first = setup_venv.wanted_stamp(venv)
    assert setup_venv.wanted_stamp(tmp_path / ".venv") != first
    (tmp_path / "pyproject.toml").write_text("changed")
    monkeypatch.setattr(setup_venv, "ROOT", tmp_path)
    assert setup_venv.wanted_stamp(venv) != first


def test_the_lowest_versions_are_those_of_pyproject(venv):
    lines = setup_venv.lowest_constraints()
    assert "numba==0.66" in lines
    assert "torch==2.7" in lines
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    assert setup_venv.wanted_stamp(venv, "lowest") != setup_venv.wanted_stamp(venv)


def test_environment_of_another_place_or_python_is_not_ours(venv, tmp_path):
    assert setup_venv.is_ours(venv)
    moved = tmp_path / "moved" / ".venv"
    moved.parent.mkdir()
    moved.symlink_to(venv)  # as good as moved: its scripts name the first place
    assert not setup_venv.is_ours(moved)
    assert not setup_venv.is_ours(tmp_path / "nothing")
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "activate").write_text(f"VIRTUAL_ENV={other}")
    (other / "bin" / "python").write_text("#!/bin/sh\necho 3.99.0\n")
    (other / "bin" / "python").chmod(0o755)
    assert not setup_venv.is_ours(other)


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = set_up(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is not a virtual environment" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failing_command_shows_its_output_and_what_to_do(tmp_path, capfd):
    log = tmp_path / "setup.log"
    with pytest.raises(SystemExit, match="setup failed"):
        setup_venv.run_logged([sys.executable, "-c", "print('the cause'); raise SystemExit(1)"], log, "Trying ...")
    printed = capfd.readouterr().err
    assert printed.startswith("Trying ...\n")
    assert "the cause" in printed
    setup_venv.run_logged([sys.executable, "-c", "print('noise')"], log, "Again ...")
    assert capfd.readouterr().err == "Again ...\n"
    assert "noise" in log.read_text(encoding="utf-8")
