"""How fast onnxruntime multiplies with a ternary matrix, by operator and layout: one thread, the best CPU time.

    python scripts/bench/onnx_products.py -n 8512 -k 2048 -m 1,16,128

The matrix is random ternary with a scale for every 256 weights, the same for all; activations are normal. Each way of
holding it is a model of that product alone. `error` is the root mean square of the difference to fp64 over that of the result.
MatMulInteger is given integers; what gives them and takes them back would cost extra. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tmexport.cli.app import run_command

GROUP = 256
FLOAT = TensorProto.FLOAT


def session(nodes: list[NodeProto], weights: dict[str, np.ndarray], n: int, k: int, kinds: tuple[int, int], options: dict[str, str]) -> ort.InferenceSession:  # fmt: skip
    """A model of these nodes: x [M, k] -> y [M, n]."""
    graph = helper.make_graph(
        nodes, "product", [helper.make_tensor_value_info("x", kinds[0], ["m", k])],
        [helper.make_tensor_value_info("y", kinds[1], ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def nbits(codes: np.ndarray, scales: np.ndarray, bits: int, block: int, accuracy: int, zero: int | None, options: dict[str, str]) -> ort.InferenceSession:  # fmt: skip
    """MatMulNBits; `zero` is the code of a zero weight, None the operator's own (2 ** (bits - 1))."""
    n, k = codes.shape
    offset = 2 ** (bits - 1) if zero is None else zero
    per_byte = 8 // bits
    parts = (codes.astype(np.int16) + offset).astype(np.uint8).reshape(n, k // block, block // per_byte, per_byte)
    packed = np.zeros(parts.shape[:3], np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << np.uint8(bits * i)
    weights = {"b": packed, "s": np.repeat(scales, GROUP // block, axis=1)}
    if zero is not None:
        byte = sum(zero << bits * i for i in range(per_byte))
        weights["z"] = np.full((n, -(-(k // block) // per_byte)), byte, np.uint8)
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", N=n, K=k, bits=bits,
                            block_size=block, accuracy_level=accuracy)  # fmt: skip
    return session([node], weights, n, k, (FLOAT, FLOAT), options)


def grouped(codes: np.ndarray, scales: np.ndarray) -> ort.InferenceSession:
    """MatMulInteger for each group of 256 columns, its scale, and the sum; the scales of activations would cost extra."""
    n, k = codes.shape
    weights = {
        "b": np.ascontiguousarray(codes.T).reshape(k // GROUP, GROUP, n),
        "s": np.ascontiguousarray(scales.T).reshape(k // GROUP, 1, n),
        "shape": np.array([0, -1, GROUP]),
        "xz": np.array(128, np.uint8),
        "axis": np.array([0]),
    }
    steps: list[tuple[str, list[str], dict[str, Any]]] = [("Reshape", ["x", "shape"], {}), ("Transpose", [], {"perm": [1, 0, 2]}), ("MatMulInteger", ["b", "xz"], {}),
             ("Cast", [], {"to": FLOAT}), ("Mul", ["s"], {}), ("ReduceSum", ["axis"], {"keepdims": 0})]  # fmt: skip
    nodes: list[NodeProto] = []
    last = ""
    for kind, inputs, attributes in steps:
        output = "y" if kind == "ReduceSum" else kind
        nodes.append(helper.make_node(kind, [*([last] if last else []), *inputs], [output], **attributes))
        last = output
    return session(nodes, weights, n, k, (TensorProto.UINT8, FLOAT), {})


def ways(codes: np.ndarray, scales: np.ndarray) -> Iterator[tuple[str, ort.InferenceSession, np.dtype]]:
    """Name, session and the type of x."""
    n, k = codes.shape
    fp32 = np.dtype(np.float32)
    for bits, blocks in ((2, (128, 64, 32)), (4, (128, 64, 32)), (8, (128, 64))):
        for block in blocks:
            yield f"MatMulNBits {bits} bits, block {block}, zero point {1 if bits == 2 else 'own'}", nbits(codes, scales, bits, block, 4, 1 if bits == 2 else None, {}), fp32  # fmt: skip
    yield "MatMulNBits 2 bits, block 128, own zero point", nbits(codes, scales, 2, 128, 4, None, {}), fp32
    for block in (128, 64, 32):
        yield f"MatMulNBits 2 bits, block {block}, lookup tables (mlas.use_lut_gemm)", nbits(codes, scales, 2, block, 4, 1, {"mlas.use_lut_gemm": "1"}), fp32  # fmt: skip
    for kind, offset in (("int8", 0), ("uint8", 1)):
        weights = {"b": np.ascontiguousarray((codes + offset).T).astype(kind), "xz": np.array(128, np.uint8), "bz": np.array(offset, kind)}  # fmt: skip
        node = helper.make_node("MatMulInteger", ["x", *weights], ["y"])
        yield f"MatMulInteger uint8 x {kind}, no scales", session([node], weights, n, k, (TensorProto.UINT8, TensorProto.INT32), {}), np.dtype(np.uint8)  # fmt: skip
    yield "MatMulInteger uint8 x int8 by groups, with the weights' scales", grouped(codes, scales), np.dtype(np.uint8)
    dense = codes * np.repeat(scales, GROUP, axis=1)
    yield "MatMul fp32", session([helper.make_node("MatMul", ["x", "b"], ["y"])], {"b": np.ascontiguousarray(dense.T)}, n, k, (FLOAT, FLOAT), {}), fp32  # fmt: skip


@click.command()
@click.option("-n", "rows", default=8512, show_default=True, help="Outputs.")
@click.option("-k", "columns", default=2048, show_default=True, help="Inputs, a multiple of 256.")
@click.option("-m", "tokens", default="1,16,128", show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="CPU time of each measurement.")
def main(rows: int, columns: int, tokens: str, seconds: float) -> None:
    """Print billions of multiply-adds a second of CPU time."""
    if columns % GROUP:
        raise click.UsageError(f"-k is {columns}; expected a multiple of {GROUP}")
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (rows, columns // GROUP)).astype(np.float16).astype(np.float32)
    dense = codes * np.repeat(scales, GROUP, axis=1).astype(np.float64)
    table = []
    for name, model, kind in ways(codes, scales):
        row: dict[str, object] = {"product": name}
        for m in map(int, tokens.split(",")):
            x = rng.standard_normal((m, columns)).astype(np.float32)
            fed = np.clip(np.rint(x * 32) + 128, 0, 255).astype(np.uint8) if kind == np.uint8 else x
            feeds = {"x": fed}
            got = model.run(None, feeds)[0]
            if kind != np.uint8:
                want = x @ dense.T
                row["error"] = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
            binding = model.io_binding()
            binding.bind_cpu_input("x", fed)
            binding.bind_output("y")
            best, end = np.inf, time.process_time() + seconds
            while (start := time.process_time()) < end:
                model.run_with_iobinding(binding)
                best = min(best, time.process_time() - start)
            row[f"gmacs_{m}"] = m * rows * columns / best / 1e9
        table.append(row)
        speeds = "  ".join(f"M={m} {row[f'gmacs_{m}']:7.1f}" for m in tokens.split(","))
        click.echo(f"{name:<72} {speeds}  error {row.get('error', float('nan')):.4f}")
    click.echo(json.dumps({"n": rows, "k": columns, "onnxruntime": ort.__version__, "products": table}))


if __name__ == "__main__":
    run_command(main, "scripts/bench/onnx_products.py")
