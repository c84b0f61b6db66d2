"""Tiny models and texts. Everything here runs in seconds on one core."""

import json

import pytest
import torch

from qat.model import LanguageModel
from qat.recipe import Recipe
from qat.tokenizer import train_tokenizer
from qat.train.training import train
from tests.qat.tiny import SENTENCES, TINY, tiny_config


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors gain nothing from a second thread, and lose much when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return LanguageModel(tiny_config(d_model=256, vocab_size=64))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A JSON Lines file of 40 short documents."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [" ".join(SENTENCES[(i + j) % 3] for j in range(12)) + f" Year {1800 + i}." for i in range(40)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_path(corpus, tmp_path_factory):
    return train_tokenizer([corpus], 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def teacher(corpus, tmp_path_factory):
    """The tiny model trained for 30 steps on the short documents, in full precision."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("teacher")
    train(Recipe(**TINY), [corpus], out, held_out=[corpus])
    return out
