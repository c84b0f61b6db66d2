"""Products with matrices of fp16 and fp32 values, whose activations are not rounded (`reference.dense`)."""

from __future__ import annotations

from collections.abc import Callable

from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import stack
from runtime_ref.kernels.intrinsics import half_to_float
from runtime_ref.kernels.packed.dense import PackedFloat, PackedHalf
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.tiles import dense_tile
from runtime_ref.kernels.vector import address

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba


def product(isa_class: type, activations_class: type, many: bool) -> Callable[..., None]:
    """`matmul.multiply` for a PackedHalf or a PackedFloat; reads s.wide, with zeros behind the last of k values."""

    def body(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        values = packed.values
        n, steps = values.shape[0], values.shape[1] // 16
        row_bytes, x_stride, x = values.strides[0], s.wide.strides[0], address(s.wide)
        y_at = stack(128)
        y = floats_at(y_at, 32)
        low, high = share((n + 3) // 4, tid, threads)
        for quad in range(low, high):
            first = quad * 4
            w = address(values) + first * row_bytes
            whole = first + 4 <= n
            for r in range(0, rows, 2):
                two = r + 2 <= rows
                if whole and two:
                    dense_tile(packed, 4, 2, w, row_bytes, x + r * x_stride, x_stride, steps, y_at)
                elif whole:
                    dense_tile(packed, 4, 1, w, row_bytes, x + r * x_stride, x_stride, steps, y_at)
                for t in range(2 if two else 1):
                    for row in range(min(4, n - first)):
                        if not whole:
                            at, own = w + row * row_bytes, x + (r + t) * x_stride
                            dense_tile(packed, 1, 1, at, row_bytes, own, x_stride, steps, y_at + 4 * (16 * t + row))
                        value = y[16 * t + row]
                        out[r + t, first + row] = out[r + t, first + row] + value if add else value

    return body


def embed_half(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = half_to_float(packed.values[token, i])


def embed_float(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = packed.values[token, i]


PRODUCTS = {PackedHalf: product, PackedFloat: product}
EMBEDDINGS = {PackedHalf: embed_half, PackedFloat: embed_float}
UNQUANTISED = (PackedHalf, PackedFloat)  # these read the activations as they are
