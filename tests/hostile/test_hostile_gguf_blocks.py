"""GGUF tensors whose bytes are no values of their type: codes, scales, numbers that are not finite, other programs' blocks."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from tests.hostile.builders import (
    BF16,
    BLOCKS,
    F16,
    F32,
    Q2_0,
    Q4_0,
    Q8_0,
    TQ1_0,
    TQ2_0,
    U32,
    Gguf,
    model,
    ternary_blocks,
    value,
)
from tests.hostile.expecting import refused
from tests.hostile.targets import accepts_gguf, peak_bytes, read_gguf

PLAIN = model()
IN, OUT, EMBED = "blk.0.ssm_in.weight", "blk.0.ssm_out.weight", "token_embd.weight"


@pytest.mark.parametrize("name", [IN, OUT])
def test_another_projects_q2_0_with_blocks_of_128(tmp_path, name):
    wide = model(Q2_0, d=128)
    rows = wide.tensor(name).dims[1]
    last = [t for t in wide.tensors if t.name != name] + [wide.tensor(name)]
    for tensors in (wide.tensors, last):  # followed by another tensor, or at the end of the file
        foreign = replace(wide, tensors=tensors).with_tensor(name, data=b"\0" * (rows * 34))
        refused(
            tmp_path, foreign, rf"'{name}' is a Q2_0 with blocks of 128 \(another project's\); expected blocks of 64"
        )


def _poke(kind: int, name: str, at: int, new: bytes) -> Gguf:
    base = model(kind)
    data = bytearray(base.tensor(name).data)
    data[at : at + len(new)] = new
    return base.with_tensor(name, data=bytes(data))


@pytest.mark.parametrize(("kind", "byte"), [(Q2_0, 2), (Q2_0, 17), (TQ2_0, 0), (TQ2_0, 63)])
@pytest.mark.parametrize("new", [0xFF, 0x03, 0xC0])
def test_the_2_bit_code_3(tmp_path, kind, byte, new):
    row_bytes = {Q2_0: 18, TQ2_0: 66}[kind]
    refused(
        tmp_path, _poke(kind, OUT, 3 * row_bytes + byte, bytes([new])), rf"{OUT}: row 3, block 0 holds the 2-bit code 3"
    )


def test_every_byte_that_five_base_3_digits_do_not_give(tmp_path):
    written = {(n * 256 + 242) // 243 for n in range(243)}
    bad = sorted(set(range(256)) - written)
    assert len(bad) == 13
    for byte in bad:
        refused(
            tmp_path,
            _poke(TQ1_0, OUT, 2 * 54 + 7, bytes([byte])),
            rf"{OUT}: row 2, block 0, byte 7 is {byte}, which no base-3 digits give",
        )
    refused(
        tmp_path, _poke(TQ1_0, OUT, 2 * 54 + 49, bytes([(1 * 256 + 242) // 243])), rf"{OUT}: row 2, block 0, byte 49"
    )


@pytest.mark.parametrize("kind", [Q2_0, TQ1_0, TQ2_0])
@pytest.mark.parametrize(
    "bits", [0x7E00, 0x7C00, 0xFC00, 0xFE01, 0x8000, 0x0001, 0x03FF, 0x8001, 0xBC00],
    ids=["NaN", "inf", "-inf", "-NaN", "-0", "smallest subnormal", "largest subnormal", "-subnormal", "-1"],
)  # fmt: skip
def test_scales_that_are_no_scales(tmp_path, kind, bits):
    size = BLOCKS[kind][1]
    at = 5 * size + (0 if kind == Q2_0 else size - 2)
    refused(
        tmp_path,
        _poke(kind, OUT, at, struct.pack("<H", bits)),
        rf"{OUT}: row 5, block 0 has the scale .*; expected \+0 or a positive normal fp16",
    )


@pytest.mark.parametrize("bits", [0x0000, 0x0400, 0x7BFF], ids=["+0", "smallest normal", "largest"])
def test_scales_at_the_edge_are_read(tmp_path, bits):
    path = tmp_path / "m.gguf"
    path.write_bytes(_poke(Q2_0, OUT, 0, struct.pack("<H", bits)).build())
    assert accepts_gguf(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0, Q4_0])
def test_values_that_are_not_finite(tmp_path, kind, bad):
    rows = 16
    if kind in (Q8_0, Q4_0):
        block = np.float16(bad).tobytes() + bytes([1]) * (BLOCKS[kind][1] - 2)
        data = bytearray((np.float16(1).tobytes() + block[2:]) * (rows * 2))
        data[2 * len(block) : 3 * len(block)] = block
    elif kind == BF16:
        data = bytearray((np.ones((rows, 64), np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
        data[128:130] = (np.array([bad], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        values = np.ones((rows, 64), np.float32 if kind == F32 else np.float16)
        values[1, 0] = bad
        data = bytearray(values.tobytes())
    refused(
        tmp_path,
        PLAIN.with_tensor(EMBED, kind=kind, data=bytes(data)),
        r"token_embd.weight: row 1, (column 0 is|block 0 has the scale) (nan|-?inf); expected a finite number",
    )


def test_groups_whose_blocks_disagree(tmp_path):
    wide = model(Q2_0, d=128).with_key("tmexport.group_size", value(U32, 128))
    path = tmp_path / "m.gguf"
    path.write_bytes(wide.build())
    assert accepts_gguf(path)
    data = bytearray(wide.tensor(OUT).data)
    data[7 * 36 + 18 : 7 * 36 + 20] = np.float16(0.5).tobytes()
    refused(
        tmp_path,
        wide.with_tensor(OUT, data=bytes(data)),
        rf"{OUT}, row 7, group 0 has different scales, but the group size is 128",
    )


def test_a_type_where_it_does_not_belong(tmp_path):
    big = model(TQ2_0)
    ternary_norm = big.with_tensor("output_norm.weight", kind=TQ2_0, data=ternary_blocks(TQ2_0, 1, 256))
    refused(tmp_path, ternary_norm, r"output_norm.weight is TQ2_0; only matrices may be ternary")
    ternary_embedding = big.with_tensor(EMBED, kind=TQ2_0, data=ternary_blocks(TQ2_0, 16, 256))
    path = tmp_path / "m.gguf"
    path.write_bytes(ternary_embedding.build())
    read_gguf(path)  # an embedding may be ternary
    refused(
        tmp_path,
        big.with_tensor("output_norm.weight", kind=Q8_0, data=b"\0" * 272),
        r"output_norm.weight is Q8_0; expected F32",
    )


@pytest.mark.parametrize("kind", [Q2_0, TQ1_0, TQ2_0])
def test_a_tensor_of_nothing_but_bad_codes_is_refused_without_listing_them(tmp_path, kind):
    big = model(kind, d=512)
    size = len(big.tensor(IN).data)
    block = b"\xff" * (BLOCKS[kind][1] - 2)
    scale = np.float16(1).tobytes()
    one = scale + block if kind == Q2_0 else block + scale
    path = tmp_path / "m.gguf"
    path.write_bytes(big.with_tensor(IN, data=one * (size // len(one))).build())
    # int8 codes: 4 to 4.8 bytes for each byte of a block, and a mask as large
    assert peak_bytes(lambda: accepts_gguf(path) and pytest.fail("accepted")) < 12 * size
