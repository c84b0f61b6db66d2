"""Protobuf's wire format, as far as it is written here by hand."""

from __future__ import annotations

LENGTH_DELIMITED = 2  # the wire type of bytes, text and messages


def tag(field: int, length: int) -> bytes:
    """What precedes the `length` bytes of a field."""
    return varint(field << 3 | LENGTH_DELIMITED) + varint(length)


def varint(value: int) -> bytes:
    """A number, at least 0, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
