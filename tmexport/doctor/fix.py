"""The one lossless transcode to a stock type: Q2_0 in blocks of 128 as blocks of 64; what was written is read back."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tmexport.doctor.header import Header, Tensor, open_bytes, read_header
from tmexport.doctor.types import Q2_0, Q2_0_G128, TYPES
from tmexport.errors import TmexportError
from tmexport.files import atomic_write


def unpack_q2(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q2_0 of any block: uint8 [n, 2 + block / 4] -> codes uint8 [n, block] in order, lowest bits first; scales' bits [n]."""
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return codes.reshape(len(blocks), -1), np.ascontiguousarray(blocks[:, :2]).view(np.uint16)[:, 0]


def split_blocks(blocks: np.ndarray) -> np.ndarray:
    """Q2_0 blocks of 128, uint8 [n, 34], as stock blocks of 64, uint8 [2 n, 18]: each half with the scale of the whole."""
    out = np.empty((len(blocks), 2, 18), np.uint8)
    out[:, :, :2] = blocks[:, None, :2]
    out[:, :, 2:] = blocks[:, 2:].reshape(-1, 2, 16)
    return out.reshape(-1, 18)


def write_stock(out: Path, data: np.ndarray, header: Header) -> None:
    def padded(n: int) -> int:
        return -(-n // header.alignment) * header.alignment

    sizes = [math.prod(t.shape) // 64 * 18 if t.fact is Q2_0_G128 else t.n_bytes or 0 for t in header.tensors]
    parts = [struct.pack("<4sIQQ", b"GGUF", header.version, len(header.tensors), len(header.metadata))]
    parts.append(data[slice(*header.keys)].tobytes())
    offset = 0
    for tensor, size in zip(header.tensors, sizes, strict=True):
        name = tensor.name.encode()
        parts.append(struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))  # fmt: skip
        parts.append(struct.pack("<IQ", tensor.type_id, offset))
        offset += padded(size)
    head = b"".join(parts)
    with atomic_write(out) as file:
        file.write(head.ljust(padded(len(head)), b"\0"))
        for tensor, size in zip(header.tensors, sizes, strict=True):
            stored = _bytes_of(data, header, tensor)
            for piece in _pieces(stored, tensor):
                file.write(np.ascontiguousarray(piece).data.cast("B"))
            file.write(b"\0" * (padded(size) - size))


def _bytes_of(data: np.ndarray, header: Header, tensor: Tensor) -> np.ndarray:
    at = header.start + tensor.offset
    return data[at : at + (tensor.n_bytes or 0)]


def _pieces(stored: np.ndarray, tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes to write, some megabytes at a time."""
    step = 34 * 2**17
    for at in range(0, len(stored), step):
        part = stored[at : at + step]
        yield split_blocks(part.reshape(-1, 34)) if tensor.fact is Q2_0_G128 else part


def check_equal(out: Path, data: np.ndarray, header: Header) -> None:
    """Codes and scales of both files, read apart from the splitting."""
    fixed = open_bytes(out)
    after = read_header(fixed)
    for old, new in zip(header.tensors, after.tensors, strict=True):
        before, now = _bytes_of(data, header, old), _bytes_of(fixed, after, new)
        if old.fact is not Q2_0_G128:
            same = new.fact == old.fact and np.array_equal(before, now)
        else:
            same = new.fact is TYPES[Q2_0] and _same_codes(before, now)
        if not same:
            raise TmexportError(f"{out}: {old.name!r} does not hold what the original holds; do not use the file")


def _same_codes(before: np.ndarray, now: np.ndarray) -> bool:
    for at in range(0, len(before) // 34, 2**17):
        count = min(2**17, len(before) // 34 - at)
        codes, scales = unpack_q2(before[34 * at : 34 * (at + count)].reshape(-1, 34))
        codes_now, scales_now = unpack_q2(now[36 * at : 36 * (at + count)].reshape(-1, 18))
        if not np.array_equal(codes.ravel(), codes_now.ravel()) or not np.array_equal(np.repeat(scales, 2), scales_now):
            return False
    return True
