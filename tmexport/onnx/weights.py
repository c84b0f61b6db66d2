"""A checkpoint's tensors as the initialisers of each form of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tmexport.checkpoint import Checkpoint, shared_group_size
from tmexport.errors import NotTernaryError, ScaleError, TmexportError
from tmexport.gguf.names import gguf_values
from tmexport.model import ModelTensor
from tmexport.model.spec import NEG_EXP
from tmexport.onnx.builder import Initializer
from tmexport.quantization import Stored
from tmexport.types import KINDS, GGMLType, encode_values, scales_per_block
from tmexport.types.blocks import pack_nibbles
from tmexport.types.ternary import pack_codes

ORT_BLOCK = (
    128  # the widest block of onnxruntime's 2-bit kernels with int8 activations; wider groups repeat their scale
)
ORT_HEAD_BLOCK = 64  # with fp32 scales 8.5 bits a weight, like Q8_0
_ROWS_AT_ONCE = 1024

F32, F16, U8, I8 = (np.dtype(t) for t in ("<f4", "<f2", "u1", "i1"))


def stored_forms(checkpoint: Checkpoint, dense: bool, embedding_type: str) -> dict[str, Stored]:
    """How the matrices of each role are written that are codes and scales; ternary ones in the widest groups that all allow.

    As in a GGUF: a role that is dense in a checkpoint where others are codes stays dense.

    Args:
        checkpoint: whose matrices.
        dense: write the projections as values, whatever they are.
        embedding_type: "q8" writes an embedding that is int8 or int4 as the codes it is.

    Raises:
        NotTernaryError: the checkpoint is dense, and a projection is not exactly ternary.
    """
    names: dict[str, list[str]] = {}
    for name in () if dense else checkpoint.config.projections:
        names.setdefault(checkpoint.config.tensors[name].role, []).append(name)
    has_codes = any(checkpoint.kind(found[0]) is not None for found in names.values())
    forms = {}
    for role, found in names.items():
        kind = checkpoint.kind(found[0])
        if kind is not None or not has_codes:
            kind = kind or "ternary"
            forms[role] = Stored(kind, _group_size(checkpoint, found, kind))
    for tensor in checkpoint.config.tensors.values():
        form = checkpoint.form(tensor.hf)
        if tensor.block is None and embedding_type == "q8" and form is not None and KINDS[form.kind].in_blocks:
            forms[tensor.role] = Stored("int8", form.group_size)  # an int4 code is one of int8 too
    return forms


def _group_size(checkpoint: Checkpoint, names: list[str], kind: str) -> int:
    try:
        return shared_group_size(checkpoint, names, kind)
    except ScaleError:
        raise
    except NotTernaryError as error:
        raise NotTernaryError(
            f"{error}; train it with `python -m qat.train`, or export it as it is with --type f16"
        ) from None


def initializer_name(tensor: ModelTensor) -> str:
    """What a weight is called in the file: its name in the checkpoint; the file holds A itself, not A_log."""
    return tensor.hf.replace(".A_log", ".A") if tensor.transform == NEG_EXP else tensor.hf


def small(checkpoint: Checkpoint, tensor: ModelTensor) -> Initializer:
    """A vector or a convolution's weight in fp32; A_log as a = -exp(A_log), rounded once from fp64 (as in the GGUF)."""

    def make() -> np.ndarray:
        return gguf_values(replace(tensor, rotated=None), _finite(checkpoint, tensor.hf))  # no rows of ours interleave

    return Initializer(initializer_name(tensor), F32, tensor.shape, make)


def coded_plain(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], stored: Stored) -> list[Initializer]:
    """codes in the checkpoint's packing (two bits for a binary one, int8 for an int8 one) and scales fp16 [n, k / group]."""
    n, k = shape
    layout = LAYOUTS[stored.kind]
    return [
        Initializer(f"{name}.codes", layout.dtype, (n, k // layout.per_byte), lambda: layout.pack(_codes(checkpoint, name))),
        Initializer(f"{name}.scales", F16, (n, k // stored.group_size), lambda: _scales(checkpoint, name, stored.group_size)),
    ]  # fmt: skip


def coded_nbits(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], stored: Stored) -> list[Initializer]:
    """MatMulNBits' B uint8 [n, k / block, block * bits / 8] and scales fp32 [n, k / block], block = min(group size, 128)."""
    n, k = shape
    layout, block = LAYOUTS[stored.kind], min(stored.group_size, ORT_BLOCK)
    packed = (n, k // block, block // layout.per_byte)
    return [
        Initializer(f"{name}.codes", U8, packed, lambda: _unsigned(layout, _codes(checkpoint, name)).reshape(packed)),
        Initializer(f"{name}.scales", F32, (n, k // block), lambda: _scales(checkpoint, name, block).astype(F32)),
    ]


@dataclass(frozen=True)
class Layout:
    """How the codes of a kind lie in a file: pack makes uint8 or int8 of them, per_byte a byte; bits: of MatMulNBits, whose
    codes are unsigned.
    """

    bits: int
    dtype: np.dtype
    pack: Callable[[np.ndarray], np.ndarray]

    @property
    def per_byte(self) -> int:
        return 8 // self.bits


LAYOUTS = {
    "ternary": Layout(2, U8, pack_codes),
    "binary": Layout(2, U8, pack_codes),  # -1 and 1: a byte holds four of them too
    "int4": Layout(4, U8, pack_nibbles),
    "int8": Layout(8, I8, np.ascontiguousarray),
}


def _unsigned(layout: Layout, codes: np.ndarray) -> np.ndarray:
    """The codes as MatMulNBits takes them: zero is 1 of two bits, 8 of four, 128 of eight."""
    return layout.pack(codes) if layout.dtype == U8 else codes.view(U8) ^ U8.type(128)


def _codes(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.codes(name).codes


def _scales(checkpoint: Checkpoint, name: str, block: int) -> np.ndarray:
    return np.ascontiguousarray(scales_per_block(checkpoint.codes(name), block, name))


def dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: np.dtype) -> list[Initializer]:
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
