"""Checkpoints and files shared by the tests, made once."""

import pytest

from tests.onnx.exporting import EMBEDDINGS, FORMS, GROUPS, TIED, UNTIED, export, write_ternary


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    return write_ternary(tmp_path_factory.mktemp("tied") / "ckpt", TIED, 64)


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    return write_ternary(tmp_path_factory.mktemp("untied") / "ckpt", UNTIED, 256)


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    return write_ternary(tmp_path_factory.mktemp("groups") / "ckpt", GROUPS, 128)


@pytest.fixture(scope="session")
def files(tied, tmp_path_factory):
    """(form, embedding type) -> a file of the tied checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    return {(f, e): export(tied, folder / f"{f}_{e}.onnx", f, e) for f in FORMS for e in EMBEDDINGS}
