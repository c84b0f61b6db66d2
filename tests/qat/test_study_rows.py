"""scripts/studies: rows in processes of their own, and what the ablation of quantisation scores."""

import math
import time

import numpy as np
import pytest
import torch

from qat.evaluate import documents_in, evaluate
from qat.model import load_model
from scripts.studies.ptq_ablation import FULL, STEPS, TEACHERS, Key, Study, keys, score, with_outliers
from scripts.studies.rows import results
from tests.qat.tiny import small_teacher


def test_rows_of_two_processes_come_as_they_finish():
    assert sorted(results(math.sqrt, [1.0, 4.0, 9.0], 2)) == [1.0, 2.0, 3.0]
    began = time.monotonic()
    assert list(results(time.sleep, [60.0, 60.0, 60.0], 2, minutes=0.02)) == []
    assert time.monotonic() - began < 30


def test_rows_of_one_process_end_with_the_time():
    assert list(results(math.sqrt, [1.0, 4.0], 1)) == [1.0, 2.0]
    assert list(results(math.sqrt, [1.0, 4.0], 1, minutes=-1)) == []


def test_what_reads_no_text_runs_once():
    wanted = keys(3)
    assert len(wanted) == len(set(wanted)) == len(TEACHERS) * (3 * len(STEPS) - 2 * 2 + 1)
    assert [key.seed for key in wanted if key.name in (FULL, "W4A16 RTN")] == [0] * 4
    assert wanted[0] == Key("as trained", 0, FULL)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer_path):
    return small_teacher(tmp_path_factory.mktemp("ablation"), tokenizer_path, 20)


def test_scores_are_those_of_evaluate_and_outliers_change_nothing(teacher, tmp_path):
    folder, text = teacher
    model = load_model(folder).requires_grad_(False)
    other = load_model(with_outliers(folder, tmp_path / "outliers")).requires_grad_(False)
    name = "backbone.layers.0.norm.weight"
    assert np.allclose(other.state_dict()[name][::64], 30 * model.state_dict()[name][::64])
    documents = documents_in([text], folder / "tokenizer.json", model.config)
    found = score(other, model, documents)
    assert found["bits_per_byte"] == pytest.approx(evaluate(folder, [text]).bits_per_byte, rel=1e-5)
    assert found["kl"] < 1e-6
    assert found["top1"] > 0.99


def test_a_row_is_made_and_scored(teacher, tmp_path):
    folder, text = teacher
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    study = Study(dict.fromkeys(TEACHERS, folder), {0: ids}, (text,), tmp_path)
    rows = {name: study.row(Key("as trained", 0, name))[1] for name in (FULL, "W8A8 RTN", "W4A8 + sort-and-cluster")}
    assert rows[FULL]["kl"] == 0
    assert rows["W8A8 RTN"]["kl"] < rows["W4A8 + sort-and-cluster"]["kl"]
    assert rows["W8A8 RTN"]["bytes"] > 0
