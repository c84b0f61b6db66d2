"""The specification: a forward pass in plain numpy, one token at a time, every rounding and order spelled out.

docs/numerics.md says the same in words. Everything is fp32 unless a line says otherwise; numpy never contracts a
multiply and an add. Readable and slow on purpose: the Numba kernels must give the same bits, and the tests hold them to it.
A file a branch (mamba1, mamba2) and a file a type of weights (ternary, blocks, dense), as in `runtime_ref.kernels`.
"""

from runtime_ref.reference.functions import exp, log1p, quantize, rms_norm, silu, softplus, sum16
from runtime_ref.reference.integers import integer_matmul
from runtime_ref.reference.model import ReferenceModel, ReferenceState
from runtime_ref.reference.products import matmul

__all__ = [
    "ReferenceModel",
    "ReferenceState",
    "exp",
    "integer_matmul",
    "log1p",
    "matmul",
    "quantize",
    "rms_norm",
    "silu",
    "softplus",
    "sum16",
]
