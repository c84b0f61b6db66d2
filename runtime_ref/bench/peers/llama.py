"""llama.cpp through its C interface, from any build of it as a shared library: whole models, and ggml's matrix product.

Parameters are passed as blocks larger than any version's structs: the library fills in what it knows, and reads no more of
them than it knows (x86-64 and AArch64 pass such structs in memory). Only fields that have long been in the same place are
set: n_ctx and n_batch, the first two of llama_context_params; work_data, the second of ggml_cplan.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import subprocess
from pathlib import Path

import numpy as np

from tmexport.errors import TmexportError

BATCH = 2048  # tokens of one llama_decode
REPEATED = 8  # products in one graph, so that starting it counts little


class _Large(c.Structure):
    _fields_ = [("words", c.c_uint32 * 256)]


class _Plan(c.Structure):
    _fields_ = [("work_size", c.c_size_t), ("work_data", c.c_void_p), ("rest", c.c_uint32 * 64)]


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        *((name, c.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class _Room(c.Structure):
    _fields_ = [("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool)]


FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Large, []),
    "llama_context_default_params": (_Large, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, _Large]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, _Large]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_batch_get_one": (_Batch, [c.c_void_p, c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, _Batch]),
    "llama_synchronize": (None, [c.c_void_p]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_print_system_info": (c.c_char_p, []),
    "ggml_init": (c.c_void_p, [_Room]),
    "ggml_new_tensor_2d": (c.c_void_p, [c.c_void_p, c.c_int, c.c_int64, c.c_int64]),
    "ggml_mul_mat": (c.c_void_p, [c.c_void_p, c.c_void_p, c.c_void_p]),
    "ggml_get_data": (c.c_void_p, [c.c_void_p]),
    "ggml_new_graph": (c.c_void_p, [c.c_void_p]),
    "ggml_build_forward_expand": (None, [c.c_void_p, c.c_void_p]),
    "ggml_graph_plan": (_Plan, [c.c_void_p, c.c_int, c.c_void_p]),
    "ggml_graph_compute": (c.c_int, [c.c_void_p, c.c_void_p]),
}


def open_library(path: Path) -> c.CDLL:
    """The library with its functions declared.

    Raises:
        TmexportError: it cannot be loaded, or is no llama.cpp.
    """
    try:
        library = c.CDLL(str(path), mode=c.RTLD_GLOBAL)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TmexportError(f"{path}: cannot be used as a llama.cpp library: {error}") from None
    library.llama_backend_init()
    return library


def library_of(package: str, python: str | None = None) -> tuple[Path, str] | None:
    """The library of xllamacpp or llama_cpp and the version, in this Python or another; None where it is not installed.

    Raises:
        TmexportError: the other Python does not run.
    """
    distribution = {"llama_cpp": "llama-cpp-python"}.get(package, package)
    if python is None and importlib.util.find_spec(package) is None:
        return None
    if python is None:
        from importlib.metadata import version

        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder, number = Path(spec.origin).parent, version(distribution)
    else:
        code = f"import importlib.metadata as m, importlib.util as u; s = u.find_spec({package!r}); print(s.origin if s else ''); print(m.version({distribution!r}) if s else '')"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TmexportError(f"{python}: does not run as a Python: {error}") from None
        lines = done.stdout.splitlines()
        if done.returncode or not lines or not lines[0]:
            return None
        folder, number = Path(lines[0]).parent, lines[1]
    for name in ("lib/libllama.so", "lib/libllama.dylib", "xllamacpp.abi3.so"):
        if (folder / name).is_file():
            return folder / name, number
    return None


class Llama:
    """A model in llama.cpp."""

    def __init__(self, library: c.CDLL, model: Path, context: int = BATCH) -> None:
        """context: tokens that a text may have. Raises TmexportError if llama.cpp does not load the file."""
        self._lib = library
        loaded = library.llama_model_load_from_file(str(model).encode(), library.llama_model_default_params())
        if not loaded:
            raise TmexportError(f"{model}: llama.cpp does not load it")
        settings = library.llama_context_default_params()
        settings.words[0], settings.words[1] = context, BATCH
        self._context = library.llama_init_from_model(loaded, settings)
        if not self._context:
            raise TmexportError(f"{model}: llama.cpp makes no context for it")

    def start(self, threads: int) -> None:
        """Forget everything and read one token."""
        self._lib.llama_set_n_threads(self._context, threads, threads)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self.read([0])

    def read(self, tokens: list[int]) -> None:
        """Logits after the last of these tokens.

        Raises:
            TmexportError: llama.cpp refuses.
        """
        for begin in range(0, len(tokens), BATCH):
            part = tokens[begin : begin + BATCH]
            ids = (c.c_int32 * len(part))(*part)  # must outlive the call
            if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(part))):
                raise TmexportError("llama_decode failed")
        self._lib.llama_synchronize(self._context)

    def logits(self, tokens: list[int], vocabulary: int) -> np.ndarray:
        """fp32 [tokens, vocabulary] after each of at most BATCH tokens, from nothing.

        Raises:
            TmexportError: llama.cpp refuses.
        """
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        ids, wanted = (c.c_int32 * len(tokens))(*tokens), (c.c_int8 * len(tokens))(*[1] * len(tokens))
        batch = self._lib.llama_batch_get_one(ids, len(tokens))
        batch.logits = c.cast(wanted, c.c_void_p)
        if self._lib.llama_decode(self._context, batch):
            raise TmexportError("llama_decode failed")
        self._lib.llama_synchronize(self._context)
        found = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(tokens), vocabulary))
        return found.copy()


class GgmlProduct:
    """y [m, n] = x [m, k] times a matrix in a GGUF's blocks, REPEATED times a call, as a ggml graph."""

    def __init__(self, library: c.CDLL, kind: int, blocks: np.ndarray, shape: tuple[int, int], x: np.ndarray) -> None:
        """kind: the number of the GGUF type; blocks: its bytes; shape: n, k; x: fp32 [m, k]."""
        lib, (n, k), m = library, shape, len(x)
        self._lib, self._shape = lib, (m, n)
        context = lib.ggml_init(_Room(blocks.nbytes + x.nbytes + REPEATED * 4 * m * n + (2 << 20), None, False))
        if not context:
            raise TmexportError("ggml_init failed")
        weights, inputs = lib.ggml_new_tensor_2d(context, kind, k, n), lib.ggml_new_tensor_2d(context, 0, k, m)
        raw, values = np.ascontiguousarray(blocks), np.ascontiguousarray(x, np.float32)
        c.memmove(lib.ggml_get_data(weights), raw.ctypes.data, raw.nbytes)
        c.memmove(lib.ggml_get_data(inputs), values.ctypes.data, values.nbytes)
        self._graph = lib.ggml_new_graph(context)
        for _ in range(REPEATED):
            self._result = lib.ggml_mul_mat(context, weights, inputs)
            lib.ggml_build_forward_expand(self._graph, self._result)
        self._plan = lib.ggml_graph_plan(self._graph, 1, None)
        self._work = np.zeros(max(self._plan.work_size, 1), np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def run(self) -> None:
        """Compute all REPEATED products.

        Raises:
            TmexportError: ggml refuses.
        """
        if self._lib.ggml_graph_compute(self._graph, c.byref(self._plan)):
            raise TmexportError("ggml_graph_compute failed")

    def result(self) -> np.ndarray:
        """fp32 [m, n]."""
        y = np.empty(self._shape, np.float32)
        c.memmove(y.ctypes.data, self._lib.ggml_get_data(self._result), y.nbytes)
        return y
