"""The scripts are not a package: their folder goes on the path, as it does when one of them is run."""

import sys

import pytest

from tests.demo.running import ROOT, run_demo

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The whole demo, once, at the tiny scale."""
    return run_demo(tmp_path_factory.mktemp("demo") / "demo_out")
