"""scripts/studies/against_bytes.py and state_rounding.py: what they score is what evaluate scores, and their rules are their rules."""

import numpy as np
import pytest
import torch

from qat.evaluate import evaluate
from qat.model import load_model
from qat.model.states import Rows, advance_int8
from scripts.studies.against_bytes import FULL, WAYS, Study, Way, table
from scripts.studies.state_rounding import Way as StateWay
from scripts.studies.state_rounding import advance, again, keep, nearest, stochastic
from tests.qat.tiny import small_teacher
from tmexport.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer_path):
    return small_teacher(tmp_path_factory.mktemp("bytes"), tokenizer_path, 8)


def test_files_are_scored_as_evaluate_scores_and_weighed_by_their_tensors(teacher, tmp_path):
    folder, text = teacher
    study = Study(folder, text, 4096, None, tmp_path)
    full, wanted = study.scored(study.full), evaluate(folder, [text]).bits_per_byte
    ids = torch.zeros(1, 8, dtype=torch.long)
    int8 = study.ours(Way("rtn", "int8"), ids, 0)
    online = study.ours(Way("rtn", "int8", transforms=("online",)), ids, 0)
    for row in (full, int8, online):
        assert set(row["bits_per_byte"]) == {"exact", "fast"}
        assert row["bits_per_byte"]["exact"] == pytest.approx(wanted, rel=2e-3)
    weights = sum(np.prod(t.shape) for t in open_checkpoint(folder).config.tensors.values() if t.low_bit)
    assert full["bytes"] - int8["bytes"] == weights * (2 - 34 / 32) == full["bytes"] - online["bytes"]
    lines = list(table({"tiny": {FULL: [full], "int8": [int8, int8]}}))
    assert lines[2].startswith(f"| tiny | {FULL} | {full['bytes'] / 1e6:.2f} | 1 | ")
    assert "(+0.00%)" in lines[2]
    assert "| 2 |" in lines[3]
    assert " ± 0.0000 (" in lines[3]


def test_only_ways_that_read_text_have_seeds():
    assert [name for name, way in WAYS.items() if not way.seeded] == ["int8 RTN (Q8_0)", "int4 RTN (Q4_0)", "int8 RTN, online Hadamard"]  # fmt: skip


def test_stochastic_rounding_is_right_on_average():
    values = torch.tensor([0.25, -3.75, 7.0, -2.0, 0.5]).repeat(1000, 1)
    drawn = torch.stack([stochastic(values, counter) for counter in range(20)])
    assert torch.equal(drawn[3], stochastic(values, 3))
    assert not torch.equal(drawn[3], drawn[4])
    assert ((drawn - values).abs() < 1).all()
    deviation = 0.5 / 20_000**0.5  # of the mean of 20,000 draws, at most
    np.testing.assert_allclose(drawn.mean((0, 1)), values[0], atol=5 * deviation)
    assert (drawn[..., 2] == 7).all()


def test_eight_bits_to_the_nearest_are_compacts_and_four_bits_lie_on_their_grid():
    rng = torch.Generator().manual_seed(0)
    rows = [Rows(torch.zeros(2, 3, 64), torch.zeros(2, 3)) for _ in range(2)]
    four, rules = Rows(torch.zeros(2, 3, 64), torch.ones(2, 3)), (advance_int8, advance(StateWay(8, nearest), 0, 1))
    for _ in range(20):
        step, b = torch.randn(2, 3, generator=rng), torch.randn(2, 1, 64, generator=rng)
        fade = torch.full((2, 1), 0.9)
        assert torch.equal(*(rule(own, fade[..., None], fade, step, b) for rule, own in zip(rules, rows, strict=True)))
        assert torch.equal(rows[0].codes, rows[1].codes)
        advance(StateWay(4, nearest), 0, 1)(four, fade[..., None], fade, step, b)
        blocks = four.codes.unflatten(-1, (-1, 32))
        codes = blocks / blocks.abs().amax(-1, keepdim=True) * 7
        assert float((codes - codes.round()).abs().max()) < 1e-4


@torch.no_grad()
def test_a_turned_state_in_fp32_changes_nothing(teacher):
    ids = torch.arange(1, 40)[None]
    model, turned = load_model(teacher[0]), load_model(teacher[0])
    keep(turned, StateWay(32, hadamard=True))
    torch.testing.assert_close(turned(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_a_passage_comes_again():
    rows = again(np.arange(1000), 3, 50)
    assert rows.shape == (3, 114)
    assert np.array_equal(rows[:, :32], rows[:, -32:])
    assert rows[1, 0] == (1000 - 82) // 3
