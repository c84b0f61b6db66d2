"""One runtime as a process that times what it is told to: the other end of `bench_llamacpp.py`.

    python scripts/bench/serve_speed.py MODEL.gguf llama.cpp|exact|fast

Reads lines "pp N THREADS" or "tg N THREADS", answers "seconds CLOCK CPU". Needs nothing beside the runtime it serves, so
that llama-cpp-python can live in a Python of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def serve_llama(path: str) -> None:
    """Answer "pp N THREADS" and "tg N THREADS" lines with seconds of clock and CPU, using llama-cpp-python."""
    import llama_cpp as lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch = 4096, 2048
    context = lib.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    memory = lib.llama_get_memory(context)

    def decode(tokens: list[int]) -> None:
        ids = (lib.llama_token * len(tokens))(*tokens)  # must outlive the call
        batch = lib.llama_batch_get_one(ids, len(tokens))
        if lib.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        lib.llama_synchronize(context)

    def start(threads: int) -> None:
        lib.llama_set_n_threads(context, threads, threads)
        lib.llama_memory_clear(memory, True)
        decode([0])

    _serve(start, decode, lambda token: decode([token]))


def serve_ours(path: str, profile: str) -> None:
    """The same with runtime_ref."""
    from runtime_ref.model import Model

    model = Model.load(path, profile, 1)
    model.compile()
    states = [model.new_state()]

    def start(threads: int) -> None:
        if model.threads != threads:
            model.threads = threads
        states[0] = model.new_state()
        model.decode(states[0], 0)

    def prefill(tokens: list[int]) -> None:
        model.prefill(states[0], tokens)

    def decode(token: int) -> None:
        model.decode(states[0], token)

    _serve(start, prefill, decode)


def _serve(start: Callable[[int], None], prefill: Callable[[list[int]], None], decode: Callable[[int], None]) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        test, count, threads = line.split()
        start(int(threads))
        clock, cpu = time.perf_counter(), time.process_time()
        if test == "pp":
            prefill([(17 * i) % 1000 for i in range(int(count))])
        else:
            for i in range(int(count)):
                decode((31 * i) % 1000)
        print("seconds", time.perf_counter() - clock, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    serve_llama(sys.argv[1]) if sys.argv[2] == "llama.cpp" else serve_ours(*sys.argv[1:])
