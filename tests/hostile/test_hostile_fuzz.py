"""The fuzzers' short form: the same targets and rules, random damage from a fixed seed. The long form: scripts/faults/fuzz_*.py."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest

from scripts.faults import fuzz_common
from tests.hostile import seeds, targets
from tests.hostile.mutate import mutate
from tests.hostile.targets import TOKENIZER_MODEL, peak_bytes


def gguf(scratch):
    def accepts(data: bytes) -> bool:
        (scratch / "m.gguf").write_bytes(data)
        return targets.accepts_gguf(scratch / "m.gguf")

    return fuzz_common.Target(seeds.gguf_seeds()[:3], seeds.gguf_words(), accepts)


def checkpoint(scratch):
    (scratch / "c").mkdir()
    return fuzz_common.Target(seeds.checkpoint_seeds(), seeds.checkpoint_words(), lambda data: targets.accepts_checkpoint(scratch / "c", data))  # fmt: skip


def tokenizer(scratch):
    return fuzz_common.Target(seeds.tokenizer_seeds(), seeds.tokenizer_words(), lambda data: targets.accepts_tokenizer(scratch / "t", data))  # fmt: skip


@pytest.mark.parametrize(("load", "executions"), [(gguf, 3000), (checkpoint, 2000), (tokenizer, 7500)])
def test_random_damage_is_refused_or_harmless(tmp_path, load, executions):
    (tmp_path / "findings").mkdir()
    target, rng = load(tmp_path), random.Random(1)
    assert all(target.accepts(seed) for seed in target.seeds)
    watch = fuzz_common.Watch(tmp_path, target)
    try:
        for _ in range(executions):
            watch.execute(mutate(rng.choice(target.seeds), rng, target.words, rng.choice(target.seeds)))
    finally:
        tracemalloc.stop()
    watch.save()
    findings = [path.read_text() for path in (tmp_path / "findings").glob("*.txt")]
    assert not findings, findings[0]
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["executions"] == executions
    assert 0 < state["accepted"] < executions  # the damage is neither always fatal nor always harmless


def test_the_rules_find_what_breaks_them(tmp_path):
    """A reader that crashes, hangs or allocates on a certain byte is caught, so an empty list of findings means something."""
    (tmp_path / "findings").mkdir()

    def accepts(data: bytes) -> bool:
        if data[:1] == b"c":
            raise IndexError("out of range")
        if data[:1] == b"m":
            bytearray(2**25)
        while data[:1] == b"s" and watch.busy() < 1.1:
            pass
        return True

    import time

    class Timed(fuzz_common.Watch):
        def busy(self) -> float:
            return time.process_time() - self.began

        def execute(self, data: bytes) -> None:
            self.began = time.process_time()
            super().execute(data)

    watch = Timed(tmp_path, fuzz_common.Target([b"a"], [], accepts))
    try:
        for data in (b"a", b"c", b"m", b"s"):
            watch.execute(data)
    finally:
        tracemalloc.stop()
    found = sorted(path.stem for path in (tmp_path / "findings").glob("*.bin"))
    assert [name.split("-at-")[0] for name in found] == ["IndexError", "memory", "slow"]


def test_found_by_fuzzing_a_small_tokenizer_takes_no_64_megabytes(tmp_path):
    """`file.read(limit + 1)` set the whole limit aside for every file, however small."""
    data = seeds.tokenizer_seeds()[0]
    assert targets.accepts_tokenizer(tmp_path / "t", data)
    assert peak_bytes(lambda: targets.accepts_tokenizer(tmp_path / "t", data)) < 2**20
    assert TOKENIZER_MODEL.vocab_size == 512
