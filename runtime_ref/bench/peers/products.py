"""One matrix product of the model, as each library computes it: x in fp32, the model's first projection, y in fp32.

Everything that belongs to the product is timed, rounding the activations included. The error is the root mean square of the
difference to fp64, over that of the fp64 product of the weights that the library was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_ref.arithmetic import preset_of
from runtime_ref.bench.peers.llama import REPEATED, GgmlProduct, open_library
from runtime_ref.bench.rates import product_scratch
from runtime_ref.gguf_source import source_of
from runtime_ref.kernels.barrier import barrier
from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.matmul import multiply, prepare
from runtime_ref.team import Team
from tmexport.errors import TmexportError
from tmexport.gguf.names import config_from_metadata, group_sizes_of
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.types import decode_codes, decode_values

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

Run = Callable[[], np.ndarray]  # computes the product `repeated` times and returns it


@dataclass(frozen=True)
class Problem:
    """The model's first projection of codes, or its first of all; shape (n, k); x is chosen by `inputs`."""

    gguf: GGUFFile
    name: str
    shape: tuple[int, int]

    def inputs(self, m: int) -> np.ndarray:
        """Activations fp32 [m, k], the same for every library."""
        return np.random.default_rng(0).standard_normal((m, self.shape[1])).astype(np.float32)

    def dense(self) -> np.ndarray:
        """The weights in fp64."""
        info = self.gguf.tensors[self.name]
        return decode_values(self.gguf.blocks(self.name), info.type, info.shape[-1], self.name).astype(np.float64)

    def codes(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Codes int8 [n, k], scales fp32 [n, blocks of the file], and the group that has one scale.

        Raises:
            TmexportError: the projection holds other values than codes -1, 0, 1.
        """
        info, groups = self.gguf.tensors[self.name], group_sizes_of(self.gguf)
        if self.name not in groups:
            raise TmexportError(f"{self.name} is {info.type.name}; expected codes -1, 0, 1")
        codes, scales = decode_codes(self.gguf.blocks(self.name), info.type, info.shape[-1], self.name)
        return codes, np.asarray(scales, np.float32), groups[self.name]


@dataclass(frozen=True)
class Product:
    """A library's product: run() does `repeated` of them; weights fp64 are what it was given, in `nbytes` bytes."""

    run: Run
    weights: np.ndarray
    nbytes: int
    repeated: int = 1

    def error(self, x: np.ndarray) -> float:
        want = x.astype(np.float64) @ self.weights.T
        return float(np.sqrt(np.mean((self.run() - want) ** 2) / np.mean(want**2)))


def problem_of(path: Path) -> Problem:
    """Raises TmexportError if the file is damaged."""
    gguf = open_gguf(path)
    groups, model = group_sizes_of(gguf), config_from_metadata(gguf)
    inside = [tensor.gguf for tensor in model.tensors.values() if tensor.block is not None and tensor.low_bit]
    name = next((name for name in inside if name in groups), inside[0])
    n, k = gguf.tensors[name].shape
    return Problem(gguf, name, (n, k))


@cached(nogil=True)
def _product(tid, threads, sync, isa, how, packed, s, x, rows, k, block, out, times):
    for _ in range(times):
        for r in range(tid, rows, threads):
            for i in range(k):
                s.wide[r, i] = x[r, i]
            prepare(how, packed, s, r, k, block)
        barrier(sync, threads)
        multiply(isa, how, packed, s, rows, k, block, out, False, tid, threads)
        barrier(sync, threads)


def by_kernels(problem: Problem, profile: str, x: np.ndarray) -> Product:
    """Ours, with one thread."""
    source, preset = source_of(problem.gguf), preset_of(profile)
    packed = source.packed(problem.name)
    block = source.activation_block(problem.name, preset)
    (n, k), m = problem.shape, len(x)
    scratch, team, isa = product_scratch(m, k), Team(1), select()
    out = np.zeros((m, -(-n // 16) * 16), np.float32)

    def run() -> np.ndarray:
        team.run(_product, isa, preset.activations, packed, scratch, x, m, k, block, out, REPEATED)
        return out[:, :n]

    return Product(run, problem.dense(), sum(array.nbytes for array in packed), REPEATED)


def by_ggml(problem: Problem, library: Path, x: np.ndarray) -> Product:
    """ggml's mul_mat in the file's own type, with one thread."""
    info = problem.gguf.tensors[problem.name]
    blocks, (n, k) = problem.gguf.blocks(problem.name), problem.shape
    product = GgmlProduct(open_library(library), int(info.type), blocks, (n, k), x)

    def run() -> np.ndarray:
        product.run()
        return product.result()

    return Product(run, problem.dense(), blocks.nbytes, REPEATED)


def by_onnxruntime(problem: Problem, x: np.ndarray) -> Product:
    """MatMulNBits with 2 bits, blocks of 128 (or the model's groups, where they are smaller), int8 activations."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    codes, scales, group = problem.codes()
    n, k = codes.shape
    block = min(128, group, k // scales.shape[1])
    fields = (codes + 1).astype(np.uint8).reshape(n, k // block, block // 4, 4)
    packed = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    weights = {
        "b": packed,
        "s": np.repeat(scales, k // block // scales.shape[1], axis=1),
        "z": np.full((n, -(-(k // block) // 4)), 0x55, np.uint8),
    }
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", N=n, K=k, bits=2,
                            block_size=block, accuracy_level=4)  # fmt: skip
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return Product(run, problem.dense(), sum(array.nbytes for array in weights.values()))


def by_pytritium(problem: Problem, x: np.ndarray) -> Product:
    """tritium.nn.TernaryLinear: the same codes with one scale for the whole matrix, which is all it has."""
    import torch
    from tritium.nn import TernaryLinear

    torch.set_num_threads(1)
    codes, _, _ = problem.codes()
    n, k = codes.shape
    layer = TernaryLinear(k, n, bias=False).eval()
    inputs = torch.from_numpy(x)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(codes.astype(np.float32)))
    scale = np.abs(codes.astype(np.float64)).mean()  # it makes its scale this mean of the absolute weights

    def run() -> np.ndarray:
        with torch.inference_mode():
            return layer(inputs).numpy()

    return Product(run, codes * scale, n * k // 4)
