"""Snapshots: after a hit the logits are a cold run's, bit for bit, in memory, from disk and through the server; a damaged,
foreign or half-written one is a miss."""

import hashlib
import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from runtime_ref.arithmetic import PRESETS
from runtime_ref.command import DEMO_MODEL
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling
from runtime_ref.serve.choice import Choice, Finished
from runtime_ref.serve.metrics import Metrics
from runtime_ref.serve.prefix_cache import PrefixCache, read_snapshot
from runtime_ref.serve.scheduler import Failed, Read, Scheduler, Work
from runtime_ref.serve.vocabulary import Vocabulary
from runtime_ref.tokenizer import Tokenizer
from tests.runtime_ref.test_speculative import built
from tests.serve.running import Server

VOCAB = 3840
TOKENS = [int(t) for t in np.random.default_rng(3).integers(1, VOCAB, 1400)]


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return Model.load(DEMO_MODEL, request.param, 1)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(Tokenizer.from_gguf(DEMO_MODEL), VOCAB)


def cache_of(model, folder=None, size=10**9, identity="a model"):
    return PrefixCache(model.new_state(), VOCAB, identity, size, folder)


def sha(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cold(model, tokens):
    state = model.new_state()
    return state, model.prefill(state, tokens)


def bits(hit):
    return sha(*hit.state.arrays.values(), hit.logits)


def test_the_longest_prefix_is_found_and_continues_bit_for_bit(model, tmp_path):
    cache = cache_of(model, tmp_path)
    for length in (5, 64, 700):
        cache.put(TOKENS[:length], *cold(model, TOKENS[:length]))
    cache.close()
    restarted = cache_of(model, tmp_path)
    wanted = cold(model, TOKENS)
    for place in (cache, restarted, restarted):  # from memory, from disk, from memory after that
        hit = place.find(TOKENS)
        assert hit.length == hit.state.tokens == 700
        logits = model.prefill(hit.state, TOKENS[700:])
        assert sha(*hit.state.arrays.values(), logits) == sha(*wanted[0].arrays.values(), wanted[1])
        whole = place.find(TOKENS[:64])
        assert (whole.length, bits(whole)) == (64, sha(*(s := cold(model, TOKENS[:64]))[0].arrays.values(), s[1]))
        assert place.find(TOKENS[:4]) is None
        assert place.find([*TOKENS[:3], 9, *TOKENS[4:]]) is None
    restarted.close()


def test_another_model_or_arithmetic_finds_nothing(model, tmp_path):
    cache = cache_of(model, tmp_path)
    cache.put(TOKENS[:9], *cold(model, TOKENS[:9]))
    cache.close()
    assert cache_of(model, tmp_path, identity="another file").find(TOKENS) is None
    other = Model.load(DEMO_MODEL, "fast" if model.profile == "exact" else "exact", 1)
    assert cache_of(other, tmp_path).find(TOKENS) is None
    assert cache_of(model, tmp_path).find(TOKENS).length == 9


def damages(data):
    rng = random.Random(1)
    for at in [0, 7, 8, 39, 40, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
        yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    yield from (data[:n] for n in (0, 7, 39, 200, len(data) // 2, len(data) - 1))
    yield data + b"\0"


def test_a_damaged_snapshot_is_a_miss_and_goes(model, tmp_path):
    cache = cache_of(model, tmp_path)
    cache.put(TOKENS[:9], *cold(model, TOKENS[:9]))
    cache.put(TOKENS[:20], *cold(model, TOKENS[:20]))
    cache.close()
    short, long = sorted(tmp_path.iterdir(), key=lambda p: int(p.stem.split("-")[1]))
    good = long.read_bytes()
    for bad in damages(good):
        long.write_bytes(bad)
        assert cache_of(model, tmp_path).find(TOKENS).length == 9
        assert not long.exists()
    long.write_bytes(short.read_bytes())  # a whole snapshot, of other tokens
    assert cache_of(model, tmp_path).find(TOKENS).length == 9
    long.mkdir()
    assert cache_of(model, tmp_path).find(TOKENS).length == 9
    short.unlink()
    assert cache_of(model, tmp_path).find(TOKENS) is None


def test_sizes_are_kept_and_the_least_used_leaves(model, tmp_path):
    state, logits = cold(model, TOKENS[:3])
    one = state.nbytes + logits.nbytes
    cache = cache_of(model, tmp_path, size=3 * one + 5000)
    for length in (3, 4, 5):
        cache.put(TOKENS[:length], state, logits)
    assert cache.find(TOKENS[:3]).length == 3  # used again
    cache.put(TOKENS[:6], state, logits)
    cache.put(TOKENS[:7], state, logits)
    assert cache.held[0] == 3 * one
    cache.close()
    assert cache.held[1] <= 3 * one + 5000
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == cache.held[1]
    assert cache_of(model, None, size=one - 1).find(TOKENS) is None
    nothing = cache_of(model, tmp_path / "none", size=0)
    nothing.put(TOKENS[:3], state, logits)
    assert nothing.find(TOKENS) is None
    smaller = cache_of(model, tmp_path, size=2 * one)
    assert smaller.held[1] <= 2 * one


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_what_grows_is_shared_by_the_snapshots_of_a_text(tmp_path, profile):
    """Attention's keys and values are kept once; who goes on where they end does so in place, any other in a copy."""
    model = built("hybrid", profile)
    ids = [int(t) for t in np.random.default_rng(4).integers(0, 300, 60)]
    cache = PrefixCache(model.new_state(), 300, "a model", 10**9, tmp_path)
    state = model.new_state()
    for start in (0, 20, 40):
        cache.put(ids[: start + 20], state, model.prefill(state, ids[start : start + 20]))
    growing = [state.arrays[name] for name in state.growing]
    constant = state.nbytes - sum(array.nbytes for array in growing)
    assert cache.held[0] == 3 * (constant + 4 * 300) + sum(array.nbytes for array in growing)
    first, second, earlier = (cache.find([*ids[:length], 299]) for length in (60, 60, 40))
    assert [hit.length for hit in (first, second, earlier)] == [60, 60, 40]
    for hit, more, shares in (
        (first, [7, 8], True),
        (second, [9], False),
        (earlier, [1, 2, 3], False),
        (first, [4], True),
    ):
        logits = model.prefill(hit.state, more)
        assert all(np.shares_memory(hit.state.arrays[name], state.arrays[name]) == shares for name in state.growing)
        text = [*ids[: hit.length], *([7, 8] if more == [4] else []), *more]
        assert sha(logits) == sha(cold(model, text)[1])
    cache.close()
    restarted = PrefixCache(model.new_state(), 300, "a model", 10**9, tmp_path)
    for length in (60, 40, 20):  # as they were put, whatever was written behind them
        hit = restarted.find([*ids[:length], 299])
        wanted = cold(model, ids[:length])
        assert (hit.length, sha(hit.logits)) == (length, sha(wanted[1]))
        assert sha(model.prefill(hit.state, [5, 6])) == sha(model.prefill(wanted[0], [5, 6]))
    restarted.close()


def test_a_snapshot_that_is_read_twice_stays_in_memory(model, tmp_path):
    cache, (state, logits) = cache_of(model, tmp_path), cold(model, TOKENS[:50])
    cache.put(TOKENS[:50], state, logits)
    cache.close()
    wanted = sha(*state.arrays.values(), logits)
    restarted = cache_of(model, tmp_path)
    for kept in (False, True, True):
        hit = restarted.find(TOKENS[:60])
        assert (hit.length, bits(hit), restarted.held[0] > 0) == (50, wanted, kept)
        model.prefill(hit.state, [1, 2])  # what is done with a hit does not show in the next
    next(tmp_path.glob("*.state")).unlink()
    assert bits(restarted.find(TOKENS[:60])) == wanted
    restarted.close()


class Recording(Choice):
    """A choice that keeps a digest of all logits that it chose from."""

    def step(self, logits):
        self.digest = getattr(self, "digest", None) or hashlib.sha256()
        self.digest.update(logits.tobytes())
        return super().step(logits)


def run(scheduler, vocabulary, prompts, count, boundaries=()):
    """Works at once: their choices, the cached tokens of each and its events' end."""
    done, cached, works = threading.Semaphore(0), {}, []
    for number, prompt in enumerate(prompts):

        def emit(event, number=number):
            if isinstance(event, Read):
                cached[number] = event.cached
            if isinstance(event, Finished | Failed):
                done.release()

        choice = Recording(0, vocabulary, Sampling(0.8, seed=number), (), count)
        works.append(Work(prompt, [choice], emit, time.monotonic() + 60, boundaries))
    scheduler.submit(works)
    for _ in prompts:
        assert done.acquire(timeout=60)
    return [(w.choices[0].digest.hexdigest(), w.choices[0].tokens) for w in works], [
        cached[i] for i in range(len(prompts))
    ]


def alone(model, prompt, count, seed):
    digest = hashlib.sha256()
    tokens = list(
        model.generate(prompt, count, Sampling(0.8, seed=seed), on_logits=lambda row: digest.update(row.tobytes()))
    )
    return digest.hexdigest(), tokens


def test_the_scheduler_gives_a_lone_run_s_bits_with_and_without_hits(model, vocabulary, tmp_path):
    """Prompts of very different lengths decode together, twice: the second time from snapshots."""
    scheduler = Scheduler(model, cache := cache_of(model, tmp_path), Metrics(), slots=3, queue=20)
    prompts = [TOKENS[:1400], TOKENS[:600], TOKENS[5:7], TOKENS[:601], [7]]
    wanted = [alone(model, prompt, 20, seed) for seed, prompt in enumerate(prompts)]
    assert cache.every == 512
    first, _ = run(scheduler, vocabulary, prompts, 20)
    assert first == wanted
    again, cached = run(scheduler, vocabulary, prompts, 20)
    assert again == wanted
    assert cached == [len(prompt) for prompt in prompts]
    longer = [*TOKENS[:1400], *wanted[0][1], 5, 6]  # the next turn: the prompt, its answer, and more
    (third,), (hit,) = run(scheduler, vocabulary, [longer], 20)
    assert third == alone(model, longer, 20, 0)
    assert hit == 1400 + 19
    scheduler.close()
    cache.close()
    scheduler = Scheduler(model, cache := cache_of(model, tmp_path), Metrics(), slots=3, queue=20)
    (fourth,), (hit,) = run(scheduler, vocabulary, [longer], 20)
    assert fourth == third
    assert hit >= 1400
    scheduler.close()


def test_boundaries_of_messages_get_snapshots(model, vocabulary):
    scheduler = Scheduler(model, cache_of(model), Metrics(), slots=2, queue=2)
    run(scheduler, vocabulary, [TOKENS[:300]], 1, boundaries=(77, 205))
    other = [*TOKENS[:250], 1, 2, 3]
    (got,), (hit,) = run(scheduler, vocabulary, [other], 5)
    assert hit == 205
    assert got == alone(model, other, 5, 0)
    other = [*TOKENS[:100], 1, 2, 3]
    assert run(scheduler, vocabulary, [other], 5)[1] == [77]
    scheduler.close()


CHAT = [{"role": "system", "content": "You write speeches about the Union. " * 20}]


def chat(server, messages):
    answer = server.post("/v1/chat/completions", messages=messages, max_tokens=24, temperature=0, logprobs=True)
    choice = answer["choices"][0]
    scores = [t["logprob"] for t in choice["logprobs"]["content"]]
    return choice["message"]["content"], scores, answer["usage"]


def test_turns_of_a_chat_cost_their_own_tokens_also_after_a_kill(template, tmp_path):
    """Every turn's log-probabilities equal those of a server that has no cache; after kill -9 the disk has the past."""
    options = ["--chat-template", template, "--threads", 1]
    messages, known = list(CHAT), 0
    with Server(*options, "--cache-dir", tmp_path) as server, Server(*options, "--cache-size", "1B") as without:
        for turn in range(4):
            messages.append({"role": "user", "content": f"Say more about matter {turn}."})
            text, scores, usage = chat(server, messages)
            assert (text, scores) == chat(without, messages)[:2]
            assert chat(without, messages)[2]["prompt_tokens_details"]["cached_tokens"] == 0
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= known
            assert usage["prompt_tokens"] - cached < 80 or turn == 0
            known = usage["prompt_tokens"]
            messages.append({"role": "assistant", "content": text})
        end = time.monotonic() + 10
        while len(list(tmp_path.glob("*.state"))) < 8 and time.monotonic() < end:
            time.sleep(0.05)
        server.stop(signal.SIGKILL)
    with Server(*options, "--cache-dir", tmp_path) as server:
        again, scores_again, usage = chat(server, messages[:-1])
        assert (again, scores_again) == (text, scores)
        assert usage["prompt_tokens_details"]["cached_tokens"] >= known - 80


def test_a_kill_while_writing_leaves_whole_snapshots_only(model, tmp_path):
    """The files that three killed servers leave are all read; scripts/faults/serve_load.py does this fifty times."""
    if model.profile != "exact":
        return
    for round_number in range(3):
        with Server("--threads", 1, "--cache-dir", tmp_path) as server:
            for number in range(3):
                server.complete(prompt=[round_number + 1, number + 1, *TOKENS[:700]], max_tokens=1)
            server.stop(signal.SIGKILL)
    names = list(tmp_path.glob("*.state"))
    assert names
    for path in names:
        key, length = path.stem.split("-")
        read_snapshot(path, key, int(length), cache_of(model).blank)


def test_a_cache_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AssertionError, match=r"error: .*file: cannot be a cache folder"), Server("--cache-dir", tmp_path / "file"):  # fmt: skip
        pass
    assert json.dumps(os.listdir(tmp_path)) == '["file"]'
