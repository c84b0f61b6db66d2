"""Where products write: rows of 16 results, as far as the output has columns."""

from __future__ import annotations

from runtime_ref.kernels.compiled import kernel
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.vector import address, peek, poke

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba


@kernel
def put_row(out, r, tile, at, add):
    """out[r, 16 tile ..] (+)= the 16 numbers at the address `at`."""
    first = tile * 16
    if first + 16 <= out.shape[1]:
        place = address(out) + r * out.strides[0] + 4 * first
        poke(place, peek(place) + peek(at) if add else peek(at))
    else:
        y = floats_at(at, 16)
        for row in range(out.shape[1] - first):
            out[r, first + row] = out[r, first + row] + y[row] if add else y[row]
