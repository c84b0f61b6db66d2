"""One run of the demo that the tests share."""

import pytest

from tests.demo.running import run_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The whole demo, once, at the tiny scale."""
    return run_demo(tmp_path_factory.mktemp("demo") / "demo_out")
