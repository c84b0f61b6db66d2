"""What a GGUF of any program is: its types and whose they are, what is wrong with it, and whether a stock file can hold the same.

Reads the header only, trusts nothing in it, and takes type ids that no stock llama.cpp knows. Sources: llama.cpp (ggml.h,
llama-vocab.cpp), ik_llama.cpp, BitNet (bitnet.cpp) and PrismML's fork, as of 2026.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import GGUFError, TmexportError, UsageError
from tmexport.gguf.reader import Cursor, read_value
from tmexport.model.dialects import tmexport_mamba2
from tmexport.tokenizer.names import NO_END
from tmexport.tokenizer.splits import BY_NAME

STOCK, BITNET, IK, PRISM = "stock llama.cpp", "bitnet.cpp", "ik_llama.cpp", "PrismML's llama.cpp"
_MOST = 2**20  # keys and tensors


@dataclass(frozen=True)
class TypeFact:
    """A tensor type: name, weights and bytes a block (0: not a number of bytes a block), who loads it, is it ternary."""

    name: str
    block: int
    bytes: int
    loads: str = STOCK
    ternary: bool = False
    note: str = ""


_SCALE_A_ROW = "its scales are fp32, one a row; no stock type holds that exactly"
TYPES = {
    0: TypeFact("F32", 1, 4), 1: TypeFact("F16", 1, 2), 2: TypeFact("Q4_0", 32, 18), 3: TypeFact("Q4_1", 32, 20),
    6: TypeFact("Q5_0", 32, 22), 7: TypeFact("Q5_1", 32, 24), 8: TypeFact("Q8_0", 32, 34), 9: TypeFact("Q8_1", 32, 36),
    10: TypeFact("Q2_K", 256, 84), 11: TypeFact("Q3_K", 256, 110), 12: TypeFact("Q4_K", 256, 144), 13: TypeFact("Q5_K", 256, 176),
    14: TypeFact("Q6_K", 256, 210), 16: TypeFact("IQ2_XXS", 256, 66), 17: TypeFact("IQ2_XS", 256, 74), 18: TypeFact("IQ3_XXS", 256, 98),
    19: TypeFact("IQ1_S", 256, 50), 20: TypeFact("IQ4_NL", 32, 18), 21: TypeFact("IQ3_S", 256, 110), 22: TypeFact("IQ2_S", 256, 82),
    23: TypeFact("IQ4_XS", 256, 136), 24: TypeFact("I8", 1, 1), 25: TypeFact("I16", 1, 2), 26: TypeFact("I32", 1, 4),
    27: TypeFact("I64", 1, 8), 28: TypeFact("F64", 1, 8), 29: TypeFact("IQ1_M", 256, 56), 30: TypeFact("BF16", 1, 2),
    34: TypeFact("TQ1_0", 256, 54, ternary=True), 35: TypeFact("TQ2_0", 256, 66, ternary=True), 39: TypeFact("MXFP4", 32, 17),
    41: TypeFact("Q1_0", 128, 18), 42: TypeFact("Q2_0", 64, 18, ternary=True),
    36: TypeFact("I2_S", 0, 0, BITNET, True, "one fp32 scale a tensor, and an order of codes that depends on the machine that wrote it; export it again from the checkpoint"),
    38: TypeFact("TL1", 0, 0, BITNET, True, "laid out for one machine's tables; export it again from the checkpoint"),
    134: TypeFact("IQ1_BN", 0, 0, IK, True, _SCALE_A_ROW), 135: TypeFact("IQ2_BN", 0, 0, IK, True, _SCALE_A_ROW),
    335: TypeFact("IQ2_BN_R4", 0, 0, IK, True, _SCALE_A_ROW),
    142: TypeFact("id 142", 0, 0, f"{PRISM} (PQ2_0), or an old {IK} (IQ2_TN)", True, "two forks use this id; its layout is not known here"),
    143: TypeFact("id 143", 0, 0, f"{PRISM} (PTQ1_0), or an old {IK} (IQ1_TN)", True, "two forks use this id; its layout is not known here"),
}  # fmt: skip
Q2_0, Q2_0_G128 = 42, TypeFact("Q2_0 of 128", 128, 34, PRISM, True, "the same id as the stock Q2_0 with blocks of 64; --fix writes those")  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """As the header declares it: ggml's order of dimensions (the contiguous one first), offset in the data section."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    fact: TypeFact

    @property
    def n_bytes(self) -> int | None:
        """None: the type's size is not known."""
        if not self.fact.block:
            return None
        return math.prod(self.shape) // self.fact.block * self.fact.bytes


@dataclass
class Diagnosis:
    """What was found. problems: a sentence each; notes: what is no fault. fix: what `--fix` would write, or None."""

    path: str
    architecture: str | None = None
    types: dict[str, int] = field(default_factory=dict)
    variant: str = "no ternary tensors"
    loads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fix: str | None = None


@dataclass(frozen=True)
class Header:
    """Keys, tensors, where the keys begin and end in the file, where the data begins, and the alignment."""

    version: int
    metadata: dict[str, Any]
    tensors: list[Tensor]
    keys: tuple[int, int]
    start: int
    alignment: int


def diagnose(path: Path) -> Diagnosis:
    """Everything that can be said of a file without running it.

    Raises:
        UsageError: there is no such file.
    """
    data = _open(path)
    result = Diagnosis(str(path))
    try:
        header = read_header(data)
    except GGUFError as error:
        result.problems.append(str(error))
        return result
    architecture = header.metadata.get("general.architecture")
    result.architecture = architecture if isinstance(architecture, str) else None
    result.types = dict(Counter(tensor.fact.name for tensor in header.tensors))
    ternary = [tensor.fact for tensor in header.tensors if tensor.fact.ternary]
    if ternary:
        result.variant = Counter(fact.name for fact in ternary).most_common(1)[0][0]
    result.problems += _layout(header, data.size)
    result.problems += list(_foreign(header))
    result.problems += list(_keys(header))
    result.loads = _who_loads(header, result.problems)
    result.notes += list(_tokenizer_notes(header.metadata))
    foreign = [t for t in header.tensors if t.fact.loads != STOCK]
    if foreign and all(t.fact is Q2_0_G128 for t in foreign) and not _layout(header, data.size):
        result.fix = f"{len(foreign)} tensors of Q2_0 with blocks of 128 as stock Q2_0 with blocks of 64, bit for bit"
    return result


def _open(path: Path) -> np.ndarray:
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected a GGUF")
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_header(data: np.ndarray) -> Header:
    """The header of a GGUF, whatever its types are.

    Raises:
        GGUFError: it is no GGUF, or the header is damaged or cut off.
    """
    cursor = Cursor(data)
    magic = bytes(cursor.take(4, "the magic"))
    if magic != b"GGUF":
        raise GGUFError(f"is not a GGUF: it starts with {magic!r}")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise GGUFError(f"is GGUF version {version}; expected 2 or 3 (a large number: a big-endian file)")
    n_tensors, n_keys = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    if max(n_tensors, n_keys) > _MOST or 13 * n_keys + 32 * n_tensors > cursor.left:
        raise GGUFError(f"promises {n_tensors} tensors and {n_keys} keys, more than its bytes can hold")
    begin, metadata = cursor.at, {}
    for _ in range(n_keys):
        key = cursor.string("a key", 2**16)
        if key in metadata:
            raise GGUFError(f"has the key {key!r} twice")
        metadata[key] = read_value(cursor, f"the value of {key!r}")
    end, declared = cursor.at, []
    for _ in range(n_tensors):
        name = cursor.string("a tensor's name", 2**16)
        n_dimensions = cursor.number("I", f"the dimensions of {name!r}")
        if not 1 <= n_dimensions <= 4:
            raise GGUFError(f"{name!r} has {n_dimensions} dimensions; expected 1 to 4")
        shape = tuple(cursor.number("Q", f"the dimensions of {name!r}") for _ in range(n_dimensions))
        declared.append((name, shape, cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")))  # fmt: skip
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment is {alignment!r}; expected a power of two from 8")
    start = -(-cursor.at // alignment) * alignment
    return Header(version, metadata, _named(declared, start, alignment, data.size), (begin, end), start, alignment)


def _named(
    declared: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> list[Tensor]:
    """Tensors with the facts of their type; Q2_0 by the space that it takes."""
    ends = sorted({offset for *_, offset in declared} | {max(0, size - start)})
    tensors = []
    for name, shape, type_id, offset in declared:
        fact = TYPES.get(type_id, TypeFact(f"id {type_id}", 0, 0, "an unknown program"))
        room = next((end for end in ends if end > offset), offset) - offset
        if type_id == Q2_0 and shape[0] % 128 == 0 and 0 <= room - math.prod(shape) // 128 * 34 < alignment:
            fact = Q2_0_G128
        tensors.append(Tensor(name, shape, type_id, offset, fact))
    return tensors


def _layout(header: Header, size: int) -> list[str]:
    """Truncation, alignment, rows that are no whole blocks, gaps and overlaps."""
    found, expected, whole = [], 0, True
    for tensor in header.tensors:
        n_bytes = tensor.n_bytes
        if 0 in tensor.shape or math.prod(tensor.shape) >= 2**62:
            found.append(f"{tensor.name!r} has the shape {list(tensor.shape)}")
            break
        if tensor.fact.block and tensor.shape[0] % tensor.fact.block:
            found.append(f"{tensor.name!r} has rows of {tensor.shape[0]}, no multiple of the {tensor.fact.name} block of {tensor.fact.block}")  # fmt: skip
        if tensor.offset % header.alignment:
            found.append(f"{tensor.name!r} starts at offset {tensor.offset}, which is not aligned to {header.alignment}")  # fmt: skip
        elif whole and tensor.offset != expected:
            found.append(f"{tensor.name!r} starts at offset {tensor.offset} of the data; expected {expected}: a gap or an overlap, which llama.cpp refuses")  # fmt: skip
        if header.start + tensor.offset + (n_bytes or 1) > size:
            found.append(f"is truncated: {tensor.name!r} reaches to byte {header.start + tensor.offset + (n_bytes or 1)}, the file has {size}")  # fmt: skip
        whole = n_bytes is not None
        expected = -(-(tensor.offset + (n_bytes or 0)) // header.alignment) * header.alignment
        if len(found) >= 5:
            break
    names = [tensor.name for tensor in header.tensors]
    if len(set(names)) != len(names):
        found.append(f"has the tensor {Counter(names).most_common(1)[0][0]!r} twice")
    return found


def _foreign(header: Header) -> Iterator[str]:
    """A sentence for each type that stock llama.cpp does not load."""
    for fact in dict.fromkeys(tensor.fact for tensor in header.tensors if tensor.fact.loads != STOCK):
        count = sum(tensor.fact is fact or tensor.fact == fact for tensor in header.tensors)
        note = f": {fact.note}" if fact.note else ""
        yield f"{count} tensors are {fact.name}, which {fact.loads} loads and stock llama.cpp does not{note}"


def _keys(header: Header) -> Iterator[str]:
    """Keys that are missing or contradict each other; tokenizer traps that change the tokens."""
    keys = header.metadata
    if not isinstance(keys.get("general.architecture"), str):
        yield "has no general.architecture, without which nothing loads it"
    model = keys.get("tokenizer.ggml.model")
    if model is None:
        yield "has no tokenizer.ggml.model, without which llama.cpp does not load it"
        return
    tokens = keys.get("tokenizer.ggml.tokens")
    if model == "none":
        return
    if tokens is None:
        yield "has no tokenizer.ggml.tokens"
        return
    rows = next((tensor.shape[-1] for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if rows is not None and rows != len(tokens):
        yield f"has {len(tokens)} tokens, but token_embd.weight has {rows} rows; llama.cpp refuses that"
    types = keys.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        yield f"has {len(tokens)} tokens and {len(types)} token types"
    if len(set(tokens)) != len(tokens):
        yield "has a token twice, at which llama.cpp stops"
    if model == "gpt2":
        if keys.get("tokenizer.ggml.merges") is None:
            yield "has no tokenizer.ggml.merges, without which llama.cpp does not load it"
        if keys.get("tokenizer.ggml.pre") in (None, "", "default"):
            yield "does not say how text is split (tokenizer.ggml.pre): llama.cpp guesses, and makes other tokens than the model was trained on"  # fmt: skip
        if keys.get("tokenizer.ggml.eos_token_id") is None:
            yield f"names no end token: llama.cpp takes the token {NO_END}"
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = keys.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and not 0 <= index < len(tokens):
            yield f"tokenizer.ggml.{name}_token_id is {index}, but there are {len(tokens)} tokens"


def _tokenizer_notes(keys: dict[str, Any]) -> Iterator[str]:
    pre = keys.get("tokenizer.ggml.pre")
    if keys.get("tokenizer.ggml.model") == "gpt2" and pre not in (None, "", "default") and pre not in BY_NAME:
        yield f"splits text as {pre!r}; our commands need --tokenizer for that"
    if keys.get("tokenizer.ggml.model") == "none":
        yield "has no tokenizer; llama.cpp's server does not run it (tmexport gguf --no-tokenizer writes one that it runs)"
    elif "tokenizer.chat_template" not in keys:
        yield "has no chat template"


def _who_loads(header: Header, problems: list[str]) -> list[str]:
    """The programs that know every type; a damaged file is loaded by none."""
    if any("truncated" in text or "aligned" in text or "overlap" in text for text in problems):
        return []
    others = list(dict.fromkeys(t.fact.loads for t in header.tensors if t.fact.loads != STOCK))
    if others:
        return others if len(others) == 1 else []
    architecture = str(header.metadata.get("general.architecture"))
    if architecture == tmexport_mamba2.NAME:
        return ["tmexport, runtime_ref"]
    ours = architecture == "mamba2"
    return [STOCK] + (["tmexport, runtime_ref"] if ours else [])


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


def write_fixed(path: Path, out: Path) -> int:
    """Write the file with stock types in place of another project's; what was written is read back and compared.

    Returns:
        How many tensors changed their type.

    Raises:
        TmexportError: there is nothing to fix, or a stock type cannot hold it, or it cannot be written.
    """
    if diagnose(path).fix is None:
        raise TmexportError(f"{path}: no lossless transcode to a stock type is known for it; nothing was written")
    if out.exists() and out.samefile(path):
        raise UsageError(f"{out}: is the file itself; name another file to write")
    data = _open(path)
    header = read_header(data)
    _write(out, data, header)
    _check_equal(out, data, header)
    return sum(tensor.fact is Q2_0_G128 for tensor in header.tensors)


def _write(out: Path, data: np.ndarray, header: Header) -> None:
    import struct

    from tmexport.files import atomic_write

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


def _check_equal(out: Path, data: np.ndarray, header: Header) -> None:
    """Codes and scales of both files, read apart from the splitting."""
    fixed = _open(out)
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
