"""TernaryTensor: codes in {-1, 0, +1} and one fp16 scale a group. The only place that quantises, packs and unpacks.

W[n, k] = codes[n, k] * scales[n, k // group_size]. A scale is +0 (then every code of its group is 0) or a positive
*normal* fp16: subnormal scales would lose bits silently on hardware that flushes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tmexport.errors import CheckpointError, NotTernaryError

GROUP_SIZES = (256, 128, 64)
SMALLEST_SCALE = np.float16(2.0**-14)  # the smallest normal fp16
LARGEST_SCALE = np.float16(65504.0)
_ROWS_AT_ONCE = 64  # keeps the intermediates in cache


def first_true(mask: np.ndarray) -> tuple[int, ...]:
    """The index of the first true element. (np.argwhere would build an index for every one: 24 bytes a bad weight.)"""
    return tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape))


@dataclass(frozen=True)
class TernaryTensor:
    """A ternary matrix [n, k]: codes int8 [n, k], scales fp16 [n, k / group_size]."""

    codes: np.ndarray
    scales: np.ndarray
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape  # type: ignore[return-value]

    @property
    def zero_ratio(self) -> float:
        """Share of zero codes."""
        return 1.0 - np.count_nonzero(self.codes) / self.codes.size

    def dense(self) -> np.ndarray:
        """The matrix in fp32 [n, k]; exact, because a code times an fp16 scale is an fp16."""
        n, k = self.shape
        grouped = self.codes.reshape(n, -1, self.group_size) * self.scales.astype(np.float32)[:, :, None]
        return grouped.reshape(n, k).astype(np.float32, copy=False)

    def check(self, name: str) -> TernaryTensor:
        """Self, after checking every invariant.

        Raises:
            CheckpointError: naming `name`, and the row and group at fault.
        """
        n, k = self.shape
        if self.group_size not in GROUP_SIZES or k % self.group_size:
            raise CheckpointError(
                f"{name}: group size {self.group_size} does not fit rows of {k}; expected 64, 128 or 256"
            )
        if self.scales.shape != (n, k // self.group_size) or self.scales.dtype != np.float16:
            raise CheckpointError(
                f"{name}: scales are {self.scales.dtype} {list(self.scales.shape)}; expected float16 {[n, k // self.group_size]}"
            )
        if self.codes.min(initial=0) < -1 or self.codes.max(initial=0) > 1:
            raise CheckpointError(f"{name}: a code lies outside -1, 0, +1; the file is damaged or not ternary")
        bits = self.scales.view(np.uint16)
        bad = (bits != 0) & ((bits < 0x0400) | (bits >= 0x7C00))  # subnormal; infinite, NaN or with the sign set
        if bad.any():
            row, group = first_true(bad)
            raise CheckpointError(
                f"{name}: row {row}, group {group} has the scale {self.scales[row, group]}; expected +0 or a positive normal fp16"
            )
        empty = bits == 0
        if empty.any():
            used = (self.codes.reshape(n, -1, self.group_size) != 0).any(axis=2)
            if (used & empty).any():
                row, group = first_true(used & empty)
                raise CheckpointError(f"{name}: row {row}, group {group} has non-zero codes but the scale 0")
        return self


def quantize_absmean(weight: np.ndarray, group_size: int = 256) -> TernaryTensor:
    """Round to nearest: scale = mean|w| of the group as fp16, code = round(clip(w / scale, -1, 1)), halves to even.

    This loses information unless `weight` already is ternary with these scales; `exact_ternary` is the lossless reading.

    Args:
        weight: fp32 [n, k], k a multiple of group_size.
        group_size: weights that share a scale.
    """
    n, k = weight.shape
    grouped = np.ascontiguousarray(weight, np.float32).reshape(n, k // group_size, group_size)
    mean = np.abs(grouped).mean(axis=2, dtype=np.float32)
    scales = np.clip(mean, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float16)
    codes = np.rint(np.clip(grouped / scales.astype(np.float32)[:, :, None], -1.0, 1.0)).astype(np.int8)
    return TernaryTensor(codes.reshape(n, k), scales, group_size)


def exact_ternary(weight: np.ndarray, name: str, group_size: int) -> TernaryTensor:
    """Read a dense matrix whose every group already is {-s, 0, +s} with s an fp16, without changing one value.

    Args:
        weight: fp32 or fp16 [n, k].
        name: for the error.
        group_size: weights that share a scale.

    Raises:
        NotTernaryError: naming the first row and group that is not of that form.
    """
    n, k = weight.shape
    if k % group_size:
        raise NotTernaryError(f"{name}: rows of {k} weights do not divide into groups of {group_size}")
    kept = weight if weight.dtype == np.float16 else weight.astype(np.float32, copy=False)
    # With the sign bit off, the bits of a float order as its magnitude does: the test is on integers, rows at a time.
    unsigned, sign = (np.uint16, 15) if kept.dtype == np.float16 else (np.uint32, 31)
    codes, scales = np.empty((n, k), np.int8), np.empty((n, k // group_size), np.float16)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bits = np.ascontiguousarray(kept[rows]).view(unsigned).reshape(-1, k // group_size, group_size)
        magnitude = bits & unsigned(2**sign - 1)
        largest = magnitude.max(axis=2)
        with np.errstate(over="ignore", invalid="ignore"):
            scales[rows] = largest.view(kept.dtype).astype(np.float16)
        scale_bits = scales[rows].view(np.uint16)
        ok = scales[rows].astype(kept.dtype).view(unsigned) == largest
        ok &= (scale_bits == 0) | ((scale_bits >= 0x0400) & (scale_bits < 0x7C00))
        ok &= ((magnitude == 0) | (magnitude == largest[:, :, None])).all(axis=2)
        if not ok.all():
            row, group = first_true(~ok)
            values = np.unique(magnitude[row, group]).view(kept.dtype)
            shown = ", ".join(f"{v:.6g}" for v in values[:3]) + (", ..." if len(values) > 3 else "")
            raise NotTernaryError(
                f"{name}: row {start + row}, group {group} (of {group_size}) is not ternary: |w| takes the values {shown}; "
                "expected 0 and one fp16 scale"
            )
        negative = (bits >> unsigned(sign)).astype(np.int8)
        codes[rows] = ((magnitude != 0) * (1 - 2 * negative)).reshape(-1, k)
    return TernaryTensor(codes, scales, group_size)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] as uint8 [n, k / 4]: 4 a byte, lowest bits first, code + 1 (the ternary checkpoint's form)."""
    two_bit = (codes + 1).astype(np.uint8).reshape(codes.shape[0], -1, 4)
    return two_bit[:, :, 0] | two_bit[:, :, 1] << 2 | two_bit[:, :, 2] << 4 | two_bit[:, :, 3] << 6


def unpack_codes(packed: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `pack_codes`.

    Raises:
        CheckpointError: a 2-bit value is 3.
    """
    codes = np.empty((*packed.shape, 4), np.int8)
    for position in range(4):
        codes[:, :, position] = (packed >> (2 * position)) & 3
    codes -= 1
    if codes.max(initial=0) > 1:
        row, column = first_true(codes.reshape(packed.shape[0], -1) > 1)
        raise CheckpointError(f"{name}: row {row}, column {column} holds the 2-bit value 3; expected 0, 1 or 2")
    return codes.reshape(packed.shape[0], -1)


def widest_exact(weight: np.ndarray, name: str) -> TernaryTensor:
    """`exact_ternary` with the largest supported group size that fits.

    Raises:
        NotTernaryError: no supported group size fits; the error is the smallest one's.
    """
    for group_size in GROUP_SIZES:
        try:
            return exact_ternary(weight, name, group_size)
        except NotTernaryError:
            if group_size == GROUP_SIZES[-1]:
                raise
    raise AssertionError("GROUP_SIZES is not empty")
