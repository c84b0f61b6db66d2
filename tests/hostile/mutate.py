"""Random damage to a file: what a fuzzer does where atheris is not installed, and the short form in the test suite."""

from __future__ import annotations

import random

_NUMBERS = [0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip


def mutate(data: bytes, rng: random.Random, words: list[bytes], other: bytes = b"") -> bytes:
    """`data` after one to six edits: bits, bytes, numbers, words of the format, cuts, copies, and pieces of `other`."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice((1, 2, 4, 8))
            out[at : at + size] = (rng.choice(_NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            word = rng.choice(words)
            out[at : at + rng.choice((0, len(word)))] = word
        elif kind == 4:
            del out[at : at + rng.choice((1, 2, 4, 8, 64, len(out)))]
        elif kind == 5:
            out[at:at] = out[at : at + rng.choice((1, 4, 16, 256))]
        elif kind == 6 and other:
            start = rng.randrange(len(other))
            piece = other[start : start + rng.choice((4, 16, 64))]
            out[at : at + len(piece)] = piece
        elif kind == 7:
            out[at : at + rng.choice((1, 2, 3))] = str(rng.choice(_NUMBERS)).encode()
    return bytes(out)
