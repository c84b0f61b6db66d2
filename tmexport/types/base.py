"""What the kinds of weights and their containers share: ids and sizes of GGML's types, codes with scales, and the rules of both.

Nothing here knows a kind: those are a file each, put together in `tmexport.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np

from tmexport.errors import CheckpointError, GGUFError, NotTernaryError

SMALLEST_SCALE = np.float16(2.0**-14)  # the smallest normal fp16
LARGEST_SCALE = np.float16(65504.0)


class GGMLType(IntEnum):
    """A tensor type of a GGUF; the value is its id in the file (llama.cpp, ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    Q1_0 = 41
    Q2_0 = 42

    @property
    def block_size(self) -> int:
        """Weights a block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self][1]

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; k must be a multiple of the block."""
        return k // self.block_size * self.block_bytes


# weights and bytes a block (ggml-common.h)
_BLOCKS = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q8_0: (32, 34),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.Q1_0: (128, 18),
    GGMLType.Q2_0: (64, 18),
}


# As bits of fp16: the smallest positive normal number, and infinity; NaN and everything with the sign set lie above it.
SCALE_BITS, INFINITE_BITS = 0x0400, 0x7C00


def first_true(mask: np.ndarray) -> tuple[int, ...]:
    """The index of the first true element. (np.argwhere would build an index for every one: 24 bytes a bad weight.)"""
    return tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape))


def bad_scales(scales: np.ndarray) -> np.ndarray:
    """Which fp16 scales of signed codes are not allowed: all but +0 and the positive normal ones.

    Subnormal scales would lose bits silently on hardware that flushes them.
    """
    bits = scales.view(np.uint16)  # of numbers, or given as such bits
    return (bits != 0) & ((bits < SCALE_BITS) | (bits >= INFINITE_BITS))


def scales_at(
    grid: np.ndarray,
    at: int,
    name: str,
    bad: Callable[[np.ndarray], np.ndarray] = bad_scales,
    expected: str = "+0 or a positive normal fp16",
) -> np.ndarray:
    """The scales in the bytes at, at + 1 of every container block of uint8 [n, blocks, bytes]: fp16 [n, blocks].

    Raises:
        GGUFError: naming `name`, and the row and block of the first that is `bad`, and what was `expected`.
    """
    scales = np.ascontiguousarray(grid[:, :, at : at + 2]).view("<f2")[:, :, 0]
    wrong = bad(scales)
    if wrong.any():
        row, block = first_true(wrong)
        raise GGUFError(f"{name}: row {row}, block {block} has the scale {scales[row, block]}; expected {expected}")
    return scales


def mean_scales(weight: np.ndarray, group_size: int) -> np.ndarray:
    """mean|w| of every group of fp32 [n, k], clamped to the positive normal fp16 numbers: fp16 [n, k / group_size]."""
    grouped = np.abs(np.ascontiguousarray(weight, np.float32)).reshape(len(weight), -1, group_size)
    mean = grouped.mean(axis=2, dtype=np.float32)
    return np.clip(mean, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float16)


def joined_scales(scales: np.ndarray, per_group: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, blocks] as one for every `per_group` of them, and where they differ inside a group: [n, blocks / per_group]."""
    grouped = scales.reshape(len(scales), -1, per_group)
    return np.ascontiguousarray(grouped[:, :, 0]), (grouped != grouped[:, :, :1]).any(axis=2)


@dataclass(frozen=True)
class Coded:
    """A matrix [n, k] as codes int8 [n, k] and one scale fp16 a group [n, k / group_size]: W = code * scale."""

    codes: np.ndarray
    scales: np.ndarray
    group_size: int

    kind: ClassVar[str]
    allowed: ClassVar[tuple[int, ...]]  # codes, ascending
    group_sizes: ClassVar[tuple[int, ...]]  # widest first
    allowed_scales: ClassVar[str] = "+0 or a positive normal fp16"

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    @property
    def zero_ratio(self) -> float:
        """Share of zero codes."""
        return 1.0 - np.count_nonzero(self.codes) / self.codes.size

    def dense(self) -> np.ndarray:
        """The matrix in fp32 [n, k]; exact, because a small code times an fp16 scale is an fp32."""
        n, k = self.shape
        grouped = self.codes.reshape(n, -1, self.group_size) * self.scales.astype(np.float32)[:, :, None]
        return grouped.reshape(n, k).astype(np.float32, copy=False)

    def check(self, name: str) -> Coded:
        """Self, after checking every invariant.

        Raises:
            CheckpointError: naming `name`, and the row and group at fault.
        """
        n, k = self.shape
        if self.group_size not in self.group_sizes or k % self.group_size:
            raise CheckpointError(
                f"{name}: group size {self.group_size} does not fit rows of {k}; expected {in_words(self.group_sizes)}"
            )
        if self.scales.shape != (n, k // self.group_size) or self.scales.dtype != np.float16:
            raise CheckpointError(
                f"{name}: scales are {self.scales.dtype} {list(self.scales.shape)}; expected float16 {[n, k // self.group_size]}"
            )
        low, high = self.codes.min(initial=self.allowed[0]), self.codes.max(initial=self.allowed[-1])
        if low < self.allowed[0] or high > self.allowed[-1] or (0 not in self.allowed and not self.codes.all()):
            raise CheckpointError(
                f"{name}: a code lies outside {_codes_in_words(self.allowed)}; the file is damaged or not {self.kind}"
            )
        bad = self._bad_scales()
        if bad.any():
            row, group = first_true(bad)
            raise CheckpointError(
                f"{name}: row {row}, group {group} has the scale {self.scales[row, group]}; expected {self.allowed_scales}"
            )
        self._check_empty(name)
        return self

    def _bad_scales(self) -> np.ndarray:
        """Which scales are not `allowed_scales`."""
        return bad_scales(self.scales)

    def _check_empty(self, name: str) -> None:
        """A scale of 0 has codes of 0 only: a group has one way of being stored."""
        empty = self.scales.view(np.uint16) == 0
        if empty.any():
            used = (self.codes.reshape(len(self.codes), -1, self.group_size) != 0).any(axis=2)
            if (used & empty).any():
                row, group = first_true(used & empty)
                raise CheckpointError(f"{name}: row {row}, group {group} has non-zero codes but the scale 0")


def _codes_in_words(codes: tuple[int, ...]) -> str:
    """Codes for a message: "-1, 0, +1", "-8 to +7"."""
    if len(codes) > 3:
        return f"{codes[0]:+d} to {codes[-1]:+d}"
    return ", ".join(f"{code:+d}" if code else "0" for code in codes)


def in_words(sizes: tuple[int, ...]) -> str:
    """Sizes for a message, ascending: "64, 128 or 256"."""
    *most, last = (str(size) for size in sorted(sizes))
    return f"{', '.join(most)} or {last}" if most else last


def scales_per_block(tensor: Coded, block: int, name: str) -> np.ndarray:
    """The scale of every block, fp16 [n, k / block].

    Raises:
        NotTernaryError: groups inside one block have different scales.
    """
    if block <= tensor.group_size:
        return np.repeat(tensor.scales, tensor.group_size // block, axis=1)
    joined, differs = joined_scales(tensor.scales, block // tensor.group_size)
    if differs.any():
        row, index = first_true(differs)
        per_block = block // tensor.group_size
        raise NotTernaryError(
            f"{name}: row {row}, groups {index * per_block} to {(index + 1) * per_block - 1} have different scales, "
            f"but a block of {block} stores one; groups of {tensor.group_size} need --type q2_0"
        )
    return joined


def widest_group(tensor: Coded) -> int:
    """The widest of the kind's group sizes whose groups have equal scales; at least the tensor's own."""
    for size in tensor.group_sizes:
        if size <= tensor.group_size:
            return tensor.group_size
        if tensor.shape[1] % size == 0 and not joined_scales(tensor.scales, size // tensor.group_size)[1].any():
            return size
    raise AssertionError("a tensor's own group size always fits")


@dataclass(frozen=True)
class Container:
    """A GGML type as a place for weights. Encoding and decoding are written apart: verify relies on that.

    file_type: general.file_type of a file whose projections have it (llama.h, enum llama_ftype).
    encode_codes: for the kinds that it holds exactly: codes int8 [n, blocks, block_size] and scales fp16 [n, blocks] ->
        uint8 [n, blocks, block_bytes].
    decode_codes: uint8 [n, blocks, block_bytes] -> the codes and scales in it; raises GGUFError, naming its last argument.
    encode_values: fp32 [n, k] -> uint8, any shape with n rows. None: values are never rounded into it.
    decode_values: uint8 [n, row_bytes] -> fp32 [n, k]. None: code times scale.
    error: the largest difference from values [n, k] that it rounds. None: its own type, compared bit for bit.
    """

    type: GGMLType
    file_type: int | None = None
    encode_codes: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] | None = None
    decode_codes: Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]] | None = None
    encode_values: Callable[[np.ndarray], np.ndarray] | None = None
    decode_values: Callable[[np.ndarray], np.ndarray] | None = None
    error: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of codes that it holds exactly."""
        return tuple(self.encode_codes or ())

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.type.block_bytes / self.type.block_size
