"""Several tokens read at once: the bits of one at a time, whatever the draft; and drafts that are what a search by hand finds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime_ref.arithmetic import PRESETS
from runtime_ref.command import DEMO_MODEL
from runtime_ref.errors import NumericsError
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling, choose, continue_tokens
from runtime_ref.speculative import Costs, Drafts, Lookup
from runtime_ref.weights import memory_source
from tests.models import mixer
from tests.runtime_ref.small import CONFIG, TOKENS, tensors
from tests.runtime_ref.test_blocks import MAMBA1, MODELS, model_of
from tmexport.errors import UsageError
from tmexport.model.branches.attention import Attention

ATTENTION = Attention(256, n_heads=4, n_kv_heads=2, head_dim=32, scale=0.2)
KINDS = {
    **{name: MODELS[name] for name in ("mamba1", "both")},
    "mamba2": (mixer(CONFIG),) * 2,
    "attention": (ATTENTION,) * 2,
    "hybrid": (mixer(CONFIG), ATTENTION, MAMBA1, ATTENTION),
}


def contents(state):
    """The bytes of all that counts in a state."""
    return {
        name: (array[:, : state.tokens] if name in state.growing else array).tobytes()
        for name, array in state.arrays.items()
    }


def built(kind, profile="exact", threads=1):
    config = model_of(*KINDS[kind])
    return Model(memory_source(config, tensors(config, "ternary64")), profile, threads)


@pytest.fixture(scope="module", params=[(kind, profile) for kind in KINDS for profile in PRESETS], ids=str)
def run(request):
    """A model; the state after a prompt; 30 greedy tokens behind it, the logits after each, and the last state."""
    model = built(*request.param, threads=2)
    start = model.new_state()
    token, tokens, rows = int(model.prefill(start, TOKENS).argmax()), [], []
    state = start.copy()
    for _ in range(30):
        tokens.append(token)
        rows.append(model.decode(state, token))
        token = int(rows[-1].argmax())
    return model, start, tokens, rows, state


def advance(model, state, token, draft):
    """The bytes of the logits that a greedy choice was made from, and the last choice."""
    seen = []
    following = model.advance(state, token, draft, lambda row: seen.append(row.tobytes()) or int(row.argmax()))
    return seen, following


@given(st.lists(st.tuples(st.integers(0, 17), st.integers(0, 20)), min_size=1, max_size=12))
@example([(16, 16)])  # a whole pass of the most tokens that is right
@example([(0, 0), (3, 0), (9, 7), (16, 15)])
@settings(max_examples=15, deadline=None)
def test_the_bits_of_one_token_at_a_time(run, drafts):
    """drafts: lengths, and how many tokens of each are right."""
    model, start, tokens, rows, end = run
    state, at = start.copy(), 0
    for length, right in [*drafts, *[(0, 0)] * len(tokens)]:
        if at == len(tokens):
            break
        draft = tokens[at + 1 : at + 1 + length]
        if right < len(draft):
            draft[right] = (draft[right] + 1) % CONFIG.vocab_size
        seen, following = advance(model, state, tokens[at], draft)
        assert seen == [row.tobytes() for row in rows[at : at + 1 + min(right, len(draft))]]
        at += len(seen)
        assert following == int(rows[at - 1].argmax())
    assert state.tokens == end.tokens
    assert contents(state) == contents(end)


def test_no_token_is_read_behind_the_end(run):
    model, start, tokens, _, _ = run
    state, one = start.copy(), start.copy()
    assert model.advance(state, tokens[0], tokens[1:9], lambda row: None) is None
    model.decode(one, tokens[0])
    assert contents(state) == contents(one)


def test_a_draft_that_breaks_the_numbers_raises_only_when_it_comes_true():
    named = tensors(CONFIG, embedding="f32", head="f32")
    named["token_embd.weight"].values[7] = np.inf
    model = Model(memory_source(CONFIG, named), "exact", 1)
    state, one = model.new_state(), model.new_state()
    wanted = model.decode(one, 5)
    assert model.advance(state, 5, [7, 5], lambda row: 9) == 9
    assert model.advance(state.copy(), 5, [7, 5], lambda row: 7) == 7  # foreseen, and not read
    assert contents(state) == contents(one)
    with pytest.raises(NumericsError, match="the embedding"):
        model.advance(state, 7, [5], lambda row: 5)
    again = model.new_state()
    assert model.advance(again, 5, [], lambda row: int((row == wanted).all())) == 1


def test_drafts_end_with_the_context():
    config = replace(model_of(ATTENTION, mixer(CONFIG)), context_length=12)
    model = Model(memory_source(config, tensors(config, "ternary64")), "exact", 1)
    whole = list(model.generate(TOKENS, 3))
    state, seen = model.new_state(), []
    assert int(model.prefill(state, TOKENS).argmax()) == whole[0]
    following = model.advance(state, whole[0], [*whole[1:], 1, 2, 3], lambda row: seen.append(0) or int(row.argmax()))
    assert (len(seen), following, state.tokens) == (2, whole[2], 12)
    with pytest.raises(UsageError, match="the model was made for 12"):
        model.advance(state, following, [1, 2], lambda row: 1)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 20))
def test_a_draft_is_what_followed_an_equal_end(text, count):
    lookup = Lookup(text)
    ends = [n for n in range(3, len(text)) if text[n - 3 : n] == text[-3:]]
    draft, sure = lookup.draft(count), max(0, lookup.length - 1)
    assert lookup.length >= 3 or not ends
    if not lookup.length:
        assert draft == []
        return
    alike = [n for n in range(1, len(text)) if text[max(0, n - sure) : n] == text[len(text) - sure :]]
    assert draft in [[*text[n:], *draft][:count] for n in alike]


def test_a_draft_goes_on_behind_other_tokens():
    """As a record with another number in it does; four others in a row end it."""
    record = [10, 11, 12, 1, 2, 3, 13, 14, 15, 16]
    lookup = Lookup([*record, 10, 11, 12])
    for other, following in ((7, [2, 3, 13]), (8, [3, 13, 14]), (9, [13, 14, 15])):
        assert lookup.push(other) is False
        assert (lookup.draft(3), lookup.length) == (following, 1)
    assert lookup.push(13) is True
    assert (lookup.draft(3), lookup.length) == ([14, 15, 16], 2)
    for other in (20, 21, 22, 23):
        assert lookup.push(other) is False
        assert lookup.length == 1
    assert lookup.push(24) is False
    assert (lookup.draft(3), lookup.length) == ([], 0)


class Fixed(Costs):
    """A machine on which three tokens cost two."""

    def of(self, tokens):
        return 2 / 3 * tokens if tokens > 1 else 1.0


class Counting:
    """A model that counts its passes by their tokens."""

    def __init__(self, model):
        self._model, self.passes, self.new_state, self.prefill = model, Counter(), model.new_state, model.prefill

    def decode(self, state, token):
        self.passes[1] += 1
        return self._model.decode(state, token)

    def advance(self, state, token, draft, take):
        self.passes[1 + len(draft)] += 1
        return self._model.advance(state, token, draft, take)


@pytest.fixture(scope="module", params=PRESETS)
def demo(request):
    return Model.load(DEMO_MODEL, request.param, 2)


def text_and_rows(model, prompt, how, state=None, read=None):
    """A hundred tokens, and the bytes of the logits that they were chosen from."""
    rows = []
    tokens = continue_tokens(
        model, prompt, 100, how, state, on_logits=lambda row: rows.append(row.tobytes()), read=read
    )
    return list(tokens), rows


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.8, seed=3), Sampling(1.0, top_k=40, top_p=0.9, seed=4)], ids=str
)
def test_texts_are_those_of_plain_decoding(demo, how):
    """Prompts that repeat themselves and one that does not; the numbers drawn do not depend on the drafts."""
    rng = np.random.default_rng(5)
    line = [int(t) for t in rng.integers(1, 3840, 40)]
    passes = Counter()
    for prompt in (line * 3, line[:20], line[:5] * 20):
        plain, rows = text_and_rows(demo, prompt, how)
        counting, state = Counting(demo), demo.new_state()
        assert text_and_rows(counting, prompt, how, state, Drafts(counting, Fixed(), prompt).read) == (plain, rows)
        one = demo.new_state()
        demo.prefill(one, [*prompt, *plain[:-1]])
        assert contents(state) == contents(one)
        passes += counting.passes
    assert sum(n for size, n in passes.items() if size > 1) > 4 or how.temperature


def test_a_text_ends_where_plain_decoding_ends_it(demo):
    prompt = [5, 6, 7, 8] * 10
    plain = list(continue_tokens(demo, prompt, 300))
    for stop in {*plain[40:200:30]}:
        state = demo.new_state()
        made = list(demo.generate(prompt, 300, stop=[stop], state=state))
        assert made == plain[: plain.index(stop) + 1]
        assert state.tokens == len(prompt) + len(made) - 1
    assert list(demo.generate(prompt, 1)) == plain[:1]
    assert list(demo.generate(prompt, 0)) == []


class Saying:
    """A model that continues a text with given tokens, and counts the passes."""

    def __init__(self, tokens):
        self._tokens, self.passes, self.new_state = tokens, Counter(), list

    def prefill(self, state, tokens):
        state.append(0)
        return self._row(0)

    def _row(self, at):
        row = np.zeros(1000, np.float32)
        row[self._tokens[at]] = 1
        return row

    def decode(self, state, token):
        self.passes[1] += 1
        state[0] += 1
        return self._row(state[0])

    def advance(self, state, token, draft, take):
        self.passes[1 + len(draft)] += 1
        for right in (*draft, None):
            state[0] += 1
            if (following := take(self._row(state[0]))) != right:
                return following
        return following


@pytest.mark.parametrize(("kinds", "page", "slowest"), [(3, 2000, 1.03), (30, 2000, 1.01), (900, 200, 1 / 1.35)])
def test_what_does_not_repeat_itself_is_decoded_token_by_token(kinds, page, slowest):
    """Random tokens foresee nothing by themselves; a repeated page of them does. The time is in that of single tokens."""
    tokens = [int(t) for t in np.resize(np.random.default_rng(7).integers(0, kinds, page), 2000)]
    model, costs = Saying(tokens), Fixed()
    made = list(continue_tokens(model, [1], 2000, read=Drafts(model, costs, [1]).read))
    assert made == tokens
    assert sum(costs.of(size) * n for size, n in model.passes.items()) <= slowest * 1999


class Flat(Costs):
    """A machine on which a pass of 8 tokens costs two of one token."""

    def of(self, tokens):
        return {1: 1.0, 2: 1.25, 4: 1.5, 8: 2.0, 16: 3.2}[tokens]


def test_numbers_of_records_are_not_tried_again():
    """Records with four numbers at fixed places, two of them side by side, after four such records: no pass begins with one of
    these and goes on, and the most is made of the others: three passes of 8 and two of one token for 24 tokens.
    """
    rng, tokens = np.random.default_rng(3), list[int]()
    for _ in range(60):
        one, two, three, four = (int(t) for t in rng.integers(100, 1000, 4))
        tokens += [*range(1, 8), one, *range(8, 14), two, three, *range(14, 20), four, 20]
    prompt, rest = tokens[: 24 * 4], tokens[24 * 4 :]
    model = Saying(rest)
    assert list(continue_tokens(model, prompt, len(rest), read=Drafts(model, Flat(), prompt).read)) == rest
    assert model.passes == {8: 3 * 56, 1: 2 * 56}


def test_costs_are_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def spend(tokens, seconds):
        with costs.measured(tokens):
            now[0] += seconds

    costs = Costs()
    assert costs.of(8) == float("inf")  # nothing is tried before it is known what one token costs
    spend(1, 1.0)
    assert costs.of(8) == pytest.approx(2.05)
    for seconds in (0.5, 0.9):
        spend(1, seconds)
    for seconds in (9.0, 2.0, 1.5, 8.0):  # the first compiles
        spend(8, seconds)
    assert costs.of(8) == pytest.approx(3.0)
    for _ in range(1001):
        spend(1, 0.5)
    assert costs.of(8) == pytest.approx(2.05)


def test_choosing_draws_once_a_token():
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(20):
        choose(logits, Sampling(1.0), rng)
        other.random()
    assert rng.random() == other.random()
