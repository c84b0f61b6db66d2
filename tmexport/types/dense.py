"""Dense types: a value a place."""

from __future__ import annotations

import numpy as np

from tmexport.types.base import Container, GGMLType


def _from_bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


CONTAINERS = (
    Container(
        GGMLType.F32,
        encode_values=lambda values: values.view(np.uint8),
        decode_values=lambda raw: raw.view("<f4").astype(np.float32, copy=False),
    ),
    Container(
        GGMLType.F16,
        1,
        encode_values=lambda values: values.astype(np.float16).view(np.uint8),
        decode_values=lambda raw: raw.view("<f2").astype(np.float32),
    ),
    Container(GGMLType.BF16, decode_values=_from_bf16),
)
