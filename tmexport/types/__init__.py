"""Kinds of weights and the containers that hold them: one registry, and the functions that use it.

A kind is codes and scales (`Coded`): ternary, binary, int8, int4; a container is a GGML type (`Container`). An addition is a file with
CONTAINERS (and its Coded class), and its lines below. What is not in the tables raises: no type stands for "any other".

    encode_codes, decode_codes     codes and scales <-> blocks, nothing rounded
    encode_values, decode_values   fp32 <-> blocks, rounded as the type rounds
    smallest_exact                 the smallest container that holds a kind in groups of some size
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tmexport.errors import GGUFError, NotTernaryError, TmexportError
from tmexport.types import binary, blocks, dense, ternary
from tmexport.types.base import Coded, Container, GGMLType, first_true, joined_scales, scales_per_block, widest_group

__all__ = [
    "CONTAINERS",
    "FILE_TYPES",
    "KINDS",
    "Coded",
    "Container",
    "GGMLType",
    "Kind",
    "container",
    "decode_codes",
    "decode_values",
    "encode_codes",
    "encode_values",
    "first_true",
    "holds",
    "joined_scales",
    "scales_per_block",
    "smallest_exact",
    "tells",
    "widest_exact",
    "widest_group",
]

CONTAINERS: dict[GGMLType, Container] = {c.type: c for m in (ternary, binary, blocks, dense) for c in m.CONTAINERS}
FILE_TYPES = {kind: c.file_type for kind, c in CONTAINERS.items() if c.file_type is not None}
_FP16_OVERFLOW = 65520.0  # rounds to infinity
_ROWS_AT_ONCE = 256  # keeps the intermediates in cache and the peak memory at one encoded tensor


@dataclass(frozen=True)
class Kind:
    """tensor: its Coded class; per_byte: codes a byte in a checkpoint; quantize rounds; exact reads a dense matrix without
    changing a value, where the values tell codes and scales (None: they do not).
    """

    tensor: type[Coded]
    per_byte: int
    pack: Callable[[np.ndarray], np.ndarray]
    unpack: Callable[[np.ndarray, str], np.ndarray]
    quantize: Callable[[np.ndarray, int], Coded]
    exact: Callable[[np.ndarray, str, int], Coded] | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether a scale belongs to a block of its container, as that of a rounded value does, and not to a recorded group."""
        return self.group_sizes == (blocks.BLOCK,)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Widest first."""
        return self.tensor.group_sizes


KINDS: dict[str, Kind] = {
    "ternary": Kind(
        ternary.TernaryTensor,
        4,
        ternary.pack_codes,
        ternary.unpack_codes,
        ternary.quantize_absmean,
        ternary.exact_ternary,
    ),
    "binary": Kind(
        binary.BinaryTensor, 8, binary.pack_signs, binary.unpack_signs, binary.quantize_sign, binary.exact_binary
    ),
    "int8": Kind(blocks.Int8Tensor, 1, blocks.pack_bytes, blocks.unpack_bytes, blocks.quantize_int8),
    "int4": Kind(blocks.Int4Tensor, 2, blocks.pack_nibbles, blocks.unpack_nibbles, blocks.quantize_int4),
}


def container(kind: GGMLType) -> Container:
    """The container of a type.

    Raises:
        GGUFError: there is none.
    """
    if kind not in CONTAINERS:
        raise GGUFError(
            f"the type {kind!r} is not in the registry; expected one of {', '.join(k.name for k in CONTAINERS)}"
        )
    return CONTAINERS[kind]


def holds(kind: GGMLType, codes: str) -> bool:
    """Whether a type exists for codes of this kind alone or among others, and never rounds values into itself."""
    found = container(kind)
    return codes in found.kinds and found.encode_values is None


def tells(kind: GGMLType, codes: str) -> bool:
    """Whether a reader who knows the type alone multiplies these codes as they are meant: it holds no values, or the codes
    are multiplied as values in its blocks are.
    """
    return holds(kind, codes) or (codes in container(kind).kinds and KINDS[codes].in_blocks)


def encode_codes(tensor: Coded, kind: GGMLType, name: str) -> np.ndarray:
    """Codes and scales as blocks: uint8 [n, row_bytes].

    Raises:
        NotTernaryError: `kind` does not hold this kind of codes, or a block would have to hold two different scales (row
            and group are named).
    """
    n, k = tensor.shape
    encoders = container(kind).encode_codes or {}
    if tensor.kind not in encoders:
        fitting = ", ".join(c.type.name for c in CONTAINERS.values() if tensor.kind in c.kinds)
        raise NotTernaryError(
            f"{name}: is {tensor.kind}, which {kind.name} does not hold exactly; expected one of {fitting}"
        )
    if k % kind.block_size:
        raise NotTernaryError(f"{name}: rows of {k} weights do not divide into {kind.name} blocks of {kind.block_size}")
    scales = scales_per_block(tensor, kind.block_size, f"{name} as {kind.name}")
    out = np.empty((n, k // kind.block_size, kind.block_bytes), np.uint8)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes = tensor.codes[rows].reshape(-1, k // kind.block_size, kind.block_size)
        out[rows] = encoders[tensor.kind](codes, scales[rows])
    return out.reshape(n, -1)


def decode_codes(raw: np.ndarray, kind: GGMLType, k: int, name: str = "tensor") -> tuple[np.ndarray, np.ndarray]:
    """The codes and scales stored in blocks.

    Args:
        raw: uint8 [n, row_bytes].
        kind: a type that holds codes.
        k: weights a row.
        name: for the error.

    Returns:
        codes int8 [n, k] and scales fp16 [n, k / block_size].

    Raises:
        GGUFError: a code or a scale that no encoder writes; or the type has no codes.
    """
    decode = container(kind).decode_codes
    if decode is None:
        raise GGUFError(f"{name}: is {kind.name}, which has no codes")
    n = raw.shape[0]
    codes, scales = decode(raw.reshape(n, k // kind.block_size, kind.block_bytes), name)
    return codes.reshape(n, k), scales


def encode_values(values: np.ndarray, kind: GGMLType, name: str) -> np.ndarray:
    """A matrix [n, k], fp32 or fp16, in a type that rounds: uint8 [n, row_bytes].

    Raises:
        TmexportError: a row does not divide into blocks, or a value does not fit the type (NaN, infinite, fp16 overflow).
    """
    encode = container(kind).encode_values
    if encode is None:
        raise TmexportError(f"{name}: cannot be rounded into {kind.name}")
    n, k = values.shape
    if k % kind.block_size:
        raise TmexportError(f"{name}: rows of {k} values do not divide into {kind.name} blocks of {kind.block_size}")
    out = np.empty((n, kind.row_bytes(k)), np.uint8)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = np.ascontiguousarray(values[rows], np.float32)
        if not np.isfinite(part).all():
            raise TmexportError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
        if kind is not GGMLType.F32 and np.abs(part).max(initial=0) >= _FP16_OVERFLOW:
            raise TmexportError(f"{name}: holds {np.abs(part).max():.6g}, which overflows fp16 (65504)")
        out[rows] = encode(part).reshape(-1, out.shape[1])
    return out


def decode_values(raw: np.ndarray, kind: GGMLType, k: int, name: str = "tensor") -> np.ndarray:
    """The values of a tensor: uint8 [n, row_bytes] -> fp32 [n, k].

    Raises:
        GGUFError: blocks are damaged, or a value is NaN or infinite.
    """
    decode = container(kind).decode_values
    if decode is not None:
        values = decode(np.ascontiguousarray(raw))
    else:
        codes, scales = decode_codes(np.ascontiguousarray(raw), kind, k, name)
        grouped = codes.reshape(len(raw), -1, kind.block_size).astype(np.float32)
        values = (grouped * scales.astype(np.float32)[:, :, None]).reshape(len(raw), k)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = first_true(~finite)
        raise GGUFError(f"{name}: row {row}, column {column} is {values[row, column]}; expected a finite number")
    return values


def widest_exact(weight: np.ndarray, name: str, kind: str = "ternary") -> Coded:
    """A dense matrix as codes of a kind, with the largest group size that fits.

    Raises:
        NotTernaryError: no group size fits; the error is the smallest one's.
    """
    exact = KINDS[kind].exact
    if exact is None:
        raise NotTernaryError(f"{name}: is dense, and values do not say which {kind} codes and scales they were")
    *wider, smallest = KINDS[kind].group_sizes
    for group_size in wider:
        with contextlib.suppress(NotTernaryError):
            return exact(weight, name, group_size)
    return exact(weight, name, smallest)


def rounded_scales(weight: np.ndarray, name: str, kind: str = "ternary") -> tuple[Coded, float]:
    """A dense matrix that is of a kind but for scales that are no fp16 numbers (BitNet's: one fp32), with these rounded.

    A code times a scale is minus the scale, 0, or the scale: rounding every weight to fp16 rounds the scale.

    Returns:
        the codes, and the largest relative error of a scale (at most 2^-11).

    Raises:
        NotTernaryError: no group size fits even so, or a weight vanishes.
    """
    with np.errstate(over="ignore"):
        rounded = weight.astype(np.float16)
    if ((rounded == 0) & (weight != 0)).any():
        raise NotTernaryError(f"{name}: holds weights too small for fp16")
    found, worst = widest_exact(rounded, name, kind), 0.0
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part, near = weight[start : start + _ROWS_AT_ONCE], rounded[start : start + _ROWS_AT_ONCE]
        kept = part != 0
        worst = max(worst, float(np.abs(near[kept] / part[kept].astype(np.float64) - 1).max(initial=0)))
    return found, worst


def smallest_exact(codes: str, group_size: int, rows: Iterable[int]) -> GGMLType | None:
    """The container with the fewest bits that holds `codes` in groups of group_size, for rows of all these lengths."""
    lengths = tuple(rows)
    fitting = [
        c
        for c in CONTAINERS.values()
        if codes in c.kinds and group_size % c.type.block_size == 0 and all(k % c.type.block_size == 0 for k in lengths)
    ]
    return min(fitting, key=lambda c: c.bits).type if fitting else None
