"""A folder that holds an old file, which a write must replace whole or leave alone."""

from pathlib import Path

import pytest

from tests.hostile.expecting import OLD


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "m.gguf").write_bytes(OLD)
    return tmp_path
