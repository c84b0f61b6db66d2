"""A checkpoint's tensors as the initialisers of each form of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tmexport.checkpoint import Checkpoint, shared_group_size
from tmexport.errors import NotTernaryError, ScaleError, TmexportError
from tmexport.gguf.names import gguf_values
from tmexport.model import ModelTensor
from tmexport.model.spec import NEG_EXP
from tmexport.onnx.builder import Initializer
from tmexport.types import GGMLType, encode_values, scales_per_block
from tmexport.types.ternary import pack_codes

ORT_BLOCK = (
    128  # the widest block of onnxruntime's 2-bit kernels with int8 activations; wider groups repeat their scale
)
ORT_HEAD_BLOCK = 64  # with fp32 scales 8.5 bits a weight, like Q8_0
_ROWS_AT_ONCE = 1024

F32, F16, U8, I8 = (np.dtype(t) for t in ("<f4", "<f2", "u1", "i1"))


def projections_group_size(checkpoint: Checkpoint) -> int:
    """The widest group that every projection allows, as `tmexport gguf` finds it.

    Raises:
        NotTernaryError: a projection is not exactly ternary.
    """
    try:
        return shared_group_size(checkpoint, checkpoint.config.projections)
    except ScaleError:
        raise
    except NotTernaryError as error:
        raise NotTernaryError(
            f"{error}; train it with `python -m qat.train`: ONNX holds ternary weights only"
        ) from None


def initializer_name(tensor: ModelTensor) -> str:
    """What a weight is called in the file: its name in the checkpoint; the file holds A itself, not A_log."""
    return tensor.hf.replace(".A_log", ".A") if tensor.transform == NEG_EXP else tensor.hf


def small(checkpoint: Checkpoint, tensor: ModelTensor) -> Initializer:
    """A vector or a convolution's weight in fp32; A_log as a = -exp(A_log), rounded once from fp64 (as in the GGUF)."""

    def make() -> np.ndarray:
        return gguf_values(tensor, _finite(checkpoint, tensor.hf))

    return Initializer(initializer_name(tensor), F32, tensor.shape, make)


def ternary_plain(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], group_size: int) -> list[Initializer]:
    """codes uint8 [n, k/4] in the checkpoint's packing and scales fp16 [n, k/group_size]."""
    n, k = shape
    return [
        Initializer(f"{name}.codes", U8, (n, k // 4), lambda: pack_codes(checkpoint.codes(name).codes)),
        Initializer(f"{name}.scales", F16, (n, k // group_size), lambda: _scales(checkpoint, name, group_size)),
    ]


def ternary_nbits(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], group_size: int) -> list[Initializer]:
    """MatMulNBits' B uint8 [n, k/block, block/4] and scales fp32 [n, k/block], block = min(group_size, 128)."""
    n, k = shape
    block = min(group_size, ORT_BLOCK)
    packed = (n, k // block, block // 4)
    return [
        Initializer(f"{name}.codes", U8, packed, lambda: pack_codes(checkpoint.codes(name).codes).reshape(packed)),
        Initializer(f"{name}.scales", F32, (n, k // block), lambda: _scales(checkpoint, name, block).astype(F32)),
    ]


def _scales(checkpoint: Checkpoint, name: str, block: int) -> np.ndarray:
    return np.ascontiguousarray(scales_per_block(checkpoint.codes(name), block, name))


def embedding_dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: np.dtype) -> list[Initializer]:
    """The matrix in fp16 or fp32."""

    def make() -> np.ndarray:
        values = _finite(checkpoint, name)
        with np.errstate(over="ignore"):
            rounded = values.astype(dtype)
        if not np.isfinite(rounded).all():
            raise TmexportError(f"{name}: holds {np.abs(values).max():.6g}, which overflows fp16 (65504)")
        return rounded

    return [Initializer(name, dtype, shape, make)]


def embedding_q8_0(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> list[Initializer]:
    """The codes int8 [n, k] and scales fp16 [n, k/32] of the GGUF's Q8_0."""
    n, k = shape

    def blocks() -> np.ndarray:
        return encode_values(checkpoint.dense(name), GGMLType.Q8_0, name).reshape(n, k // 32, 34)

    return [
        Initializer(f"{name}.codes", I8, (n, k), lambda: np.ascontiguousarray(blocks()[:, :, 2:]).view(I8).reshape(n, k)),
        Initializer(f"{name}.scales", F16, (n, k // 32), lambda: np.ascontiguousarray(blocks()[:, :, :2]).view(F16)[..., 0]),
    ]  # fmt: skip


def embedding_nbits(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> list[Initializer]:
    """MatMulNBits' 8-bit B uint8 [n, k/64, 64] (zero point 128) and scales fp32 [n, k/64] = max|w| / 127."""
    n, k = shape
    blocks = (n, k // ORT_HEAD_BLOCK, ORT_HEAD_BLOCK)

    def quantized(pick: Callable[[np.ndarray], np.ndarray], out: np.ndarray) -> np.ndarray:
        for rows, x in _row_blocks(_finite(checkpoint, name).reshape(blocks)):
            out[rows] = pick(x)
        return out

    def scale(x: np.ndarray) -> np.ndarray:
        return np.abs(x).max(axis=2) / F32.type(127)

    def codes(x: np.ndarray) -> np.ndarray:
        d = scale(x)[:, :, None]
        return (np.rint(np.divide(x, d, out=np.zeros_like(x), where=d != 0)) + 128).astype(U8)

    return [
        Initializer(f"{name}.codes", U8, blocks, lambda: quantized(codes, np.empty(blocks, U8))),
        Initializer(f"{name}.scales", F32, blocks[:2], lambda: quantized(scale, np.empty(blocks[:2], F32))),
    ]


def _row_blocks(values: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(values), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield rows, values[rows]


def _finite(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = np.ascontiguousarray(checkpoint.dense(name), F32)
    if not np.isfinite(values).all():
        raise TmexportError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
    return values
