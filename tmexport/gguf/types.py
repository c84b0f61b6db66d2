"""The GGML types that a Mamba-2 file uses: id, weights a block, bytes a block (llama.cpp, ggml.h and ggml-common.h)."""

from __future__ import annotations

from enum import IntEnum


class GGMLType(IntEnum):
    """A tensor type; the value is its id in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    Q2_0 = 42

    @property
    def block_size(self) -> int:
        """Weights a block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self][1]

    @property
    def is_ternary(self) -> bool:
        return self in FILE_TYPES and self is not GGMLType.F16

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; k must be a multiple of the block."""
        return k // self.block_size * self.block_bytes


_BLOCKS = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q8_0: (32, 34),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.Q2_0: (64, 18),
}

# general.file_type for a file whose projections have this type (llama.h, enum llama_ftype)
FILE_TYPES = {GGMLType.F16: 1, GGMLType.TQ1_0: 36, GGMLType.TQ2_0: 37, GGMLType.Q2_0: 41}
