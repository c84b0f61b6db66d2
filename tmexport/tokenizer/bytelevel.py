"""The characters that byte-level BPE writes bytes as (GPT-2's encoder.py: printable Latin-1 as it is, the rest from U+0100)."""

from __future__ import annotations

from collections.abc import Container

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTER_OF = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
CHARACTERS = frozenset(CHARACTER_OF.values())
IN_UTF8 = tuple(byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5)


def missing_bytes(vocabulary: Container[str]) -> list[int]:
    """The bytes of valid UTF-8 that have no token of their own."""
    return [byte for byte in IN_UTF8 if CHARACTER_OF[byte] not in vocabulary]


def sample_with(byte: int) -> str:
    """A character whose UTF-8 holds this byte."""
    if byte < 0x80:
        return chr(byte)
    if byte < 0xC0:
        return bytes([0xC3, byte]).decode()
    if byte < 0xE0:
        return bytes([byte, 0xA9]).decode()
    second = {0xE0: 0xA4, 0xF0: 0x9F}.get(byte, 0x80)
    return bytes([byte, second, 0x80] if byte < 0xF0 else [byte, second, 0x80, 0x80]).decode()
