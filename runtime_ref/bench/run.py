"""One run of the bench: everything that was asked for, in order, as one object that JSON can hold.

{"rows": [...], "machine": {...}, "model": "...", "file_bytes": ..., "load": {profile: {...}},
 "memory": {profile: {...}}, "depth_ms": {profile: {depth: ms}}, "chunk_tokens_per_second": {profile: {chunk: ...}},
 "workloads": {profile: {name: {...}}}, "file_sizes": [...], "peak_rss_bytes": ..., "settings": {...}}
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench.bandwidth import read_bandwidth
from runtime_ref.bench.energy import find_meters
from runtime_ref.bench.machine import conditions, describe
from runtime_ref.bench.measure import (
    Row,
    chunk_tokens,
    peak_rss,
    reset_peak,
    time_chunks,
    time_decode,
    time_depths,
    time_prefill,
)
from runtime_ref.bench.sizes import file_sizes
from runtime_ref.bench.workloads import WORKLOADS, tokens_of
from runtime_ref.command import compile_kernels
from runtime_ref.kernels.cache import compilations
from runtime_ref.memory import need, parse_size
from runtime_ref.model import Model
from tmexport.gguf.names import config_from_metadata
from tmexport.gguf.reader import open_gguf


@dataclass(frozen=True)
class Settings:
    """What to measure. `threads` is tried for pp and tg; depth, chunks and workloads use the most of them."""

    prompt: int = 128
    count: int = 64
    threads: Sequence[int] = (1, 2)
    repeats: int = 5
    profiles: Sequence[str] = tuple(PRESETS)
    depths: Sequence[int] = (0, 1000, 8000)
    chunks: Sequence[int] = (1, 8, 32, 128, 512)
    workloads: Sequence[str] = ()
    workload_scale: float = 1.0

    def tokens(self) -> int:
        """Tokens of the whole run, for a progress bar."""
        speed = len(self.threads) * self.repeats * (self.prompt + self.count + 1)
        depth = max(self.depths) + len(self.depths) * self.count
        chunk = 2 * sum(chunk_tokens(chunk) for chunk in self.chunks)
        loads = sum(tokens_of(name, self.workload_scale) for name in self.workloads)
        return len(self.profiles) * (speed + depth + chunk + loads)

    def states(self) -> int:
        """How many states are in memory at a time: saving and loading one copies it."""
        return 4 if "chat" in self.workloads else 2


def run_bench(path: Path, settings: Settings, on_progress: Callable[[str, int], None]) -> dict[str, Any]:
    """Measure the model in `path`; on_progress(what, tokens done) is called as it goes.

    Raises:
        GGUFError: the file is damaged, or has layers or types that this runtime does not compute.
    """
    gguf = open_gguf(path)
    sizes, config = file_sizes(gguf), config_from_metadata(gguf)
    projection = config.tensors[config.projections[0]].gguf
    compiles = 0  # profiles that were compiled, whose memory stays; the yardstick alone takes the compiler too
    machine, before = describe(), conditions()
    on_progress("memory bandwidth", 0)
    bandwidth = measured_bandwidth(settings.threads, machine)
    meters = find_meters()
    rows: list[Row] = []
    result: dict[str, Any] = {"load": {}, "memory": {}, "depth_ms": {}, "chunk_tokens_per_second": {}, "workloads": {}}
    for name in settings.profiles:
        on_progress(f"{name}, loading", 0)
        reset_peak()
        start, known = time.perf_counter(), compilations()
        model = Model.load(path, name, max(settings.threads))
        loaded = time.perf_counter() - start
        compiled = compile_kernels(model)
        model.decode(model.new_state(), 0)
        first = time.perf_counter() - start
        result["load"][name] = {"load_s": loaded, "compile_s": compiled, "first_token_s": first}
        for number in settings.threads:
            model.threads = number
            step = _told(on_progress, f"{name}, {number} threads")
            rows.append(time_prefill(model, settings.prompt, settings.repeats, step))
            rows.append(time_decode(model, settings.count, settings.repeats, bandwidth[number], meters, step))
        model.threads = max(settings.threads)
        depth, chunk = _told(on_progress, f"{name}, depth"), _told(on_progress, f"{name}, chunks")
        result["depth_ms"][name] = time_depths(model, settings.depths, settings.count, depth)
        result["chunk_tokens_per_second"][name] = time_chunks(model, settings.chunks, chunk)
        result["workloads"][name] = {
            work: WORKLOADS[work](model, settings.workload_scale, _told(on_progress, f"{name}, {work}"))
            for work in settings.workloads
        }
        compiles = max(compiles + (compilations() > known), min(1, compilations()))
        result["memory"][name] = {
            "weight_bytes": model.weight_bytes, "state_bytes": model.new_state().nbytes,
            "peak_rss_bytes": peak_rss(), "expected_bytes": need(gguf, name, settings.states(), compiles).total,
        }  # fmt: skip
        model.close()
        del model
    machine |= {"before": before, "after": conditions(), "energy_sources": [meter.name for meter in meters],
                "read_bytes_per_second": {str(t): b for t, b in bandwidth.items()}}  # fmt: skip
    return {
        "rows": [asdict(row) for row in rows],
        "machine": machine,
        "model": str(path),
        "type": gguf.tensors[projection].type.name,
        "embedding_type": gguf.tensors["token_embd.weight"].type.name,
        "file_bytes": path.stat().st_size,
        **result,
        "file_sizes": sizes,
        "peak_rss_bytes": max(memory["peak_rss_bytes"] for memory in result["memory"].values()),
        "settings": asdict(settings),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def measured_bandwidth(threads: Sequence[int], machine: dict[str, Any]) -> dict[int, float]:
    """Bytes a second that so many threads read, measured in a process whose buffer does not count as our memory.

    The buffer is 256 MB, or eight times the largest cache; but at most an eighth of the machine's memory.
    """
    largest = max((parse_size(size) for size in machine["caches"].values()), default=0)
    size = min(max(2**28, 8 * largest), (machine["memory_bytes"] or 2**31) // 8) // 4096 * 4096
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return dict(zip(threads, other.map(read_bandwidth, threads, [size] * len(threads)), strict=True))


def _told(on_progress: Callable[[str, int], None], what: str) -> Callable[[int], None]:
    return lambda done: on_progress(what, done)
