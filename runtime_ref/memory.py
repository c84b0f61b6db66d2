"""How much memory a model will take, from the file's header alone: before anything is loaded.

    needed = need(open_gguf("model.gguf"), "exact")
    print(needed.total)

Weights and state follow from the dimensions. What does not (Python, Numba, the compiler) is FIXED and COMPILER, measured on
x86-64 with Python 3.11, numba 0.68 and models up to 370m: 109 to 127 MB, and 83 MB more where the kernels must be
compiled first; with room to spare. Tests hold a real process to the sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from runtime_ref.arithmetic import preset_of
from runtime_ref.gguf_source import check_branches
from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.speculative import MOST
from runtime_ref.state import state_arrays, with_positions
from tmexport.errors import TmexportError, UsageError
from tmexport.gguf.export import EMBEDDING_TYPES, low_bit_types, tensor_layout
from tmexport.gguf.names import GROUP_SIZE_KEY, TOKENIZER_JSON_KEY, config_from_metadata
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.model import Model
from tmexport.model.rope import context_limit
from tmexport.threads import default_threads
from tmexport.types import KINDS, GGMLType, container, holds

FIXED = 165_000_000
COMPILER = 75_000_000
TOKENIZER = 16  # bytes for each byte of a tokenizer.json, once it is parsed
POSITIONS = 8192  # counted of a model with attention that states no context length; others count to theirs
SCORES = 16  # of a position, that each thread has room for (`Job.scores`)
PACKERS = 4  # layers that are read at a time while loading (kernels.build)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

Layout = Mapping[str, tuple[tuple[int, ...], GGMLType]]


class MemorySize(click.ParamType):
    """A number of bytes for click: 512M, 1.5G, 800MB (powers of 1000), 512MiB (of 1024)."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_size(text: str) -> int:
    """Bytes from a number with a unit: K, M, G, T (powers of 1000), Ki, Mi, Gi, Ti (of 1024), each with or without B.

    Raises:
        ValueError: it is not such a number, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    if found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise ValueError(f"{text!r} is not an amount of memory; expected a number and a unit, such as 512M or 1.5G")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Need:
    """Bytes of memory: weights in the kernels' layout, states, everything else a process has, and the peak of loading."""

    weights: int
    states: int
    other: int
    loading: int

    @property
    def total(self) -> int:
        """The most that is in use at once."""
        return max(self.weights + self.states, self.loading) + self.other


def need(gguf: GGUFFile, profile: str, states: int = 1, compiles: int = 1) -> Need:
    """What the model in a file needs; `states` held at a time, kernels compiled for `compiles` profiles by then.

    Raises:
        GGUFError: it is damaged, or has layers that this runtime does not compute.
    """
    layout = {name: (info.shape, info.type) for name, info in gguf.tensors.items()}
    model = config_from_metadata(gguf)
    check_branches(model, gguf.path)
    return _need(gguf, model, layout, profile, states, compiles)


def check_memory(path: Path | str, limit: int, profile: str, states: int = 1, compiles: int = 1) -> Need:
    """Refuse a model that needs more than `limit` bytes, and say what would fit; nothing is loaded.

    Raises:
        TmexportError: it needs more.
        GGUFError: as `need`.
    """
    gguf = open_gguf(path)
    own = need(gguf, profile, states, compiles)
    if own.total <= limit:
        return own
    parts = (
        f"weights {_mb(own.weights)}, state {_mb(own.states)}, Python {_mb(own.other - compiles * COMPILER)}, "
        f"and {_mb(compiles * COMPILER)} for compiling in the first run"
    )
    raise TmexportError(
        f"{gguf.path}: needs {_mb(own.total)} MB of memory in profile {profile} ({parts}), more than the {_mb(limit)} MB allowed; "
        + _advice(gguf, limit, profile, states, compiles, own)
    )


def _advice(gguf: GGUFFile, limit: int, profile: str, states: int, compiles: int, own: Need) -> str:
    """The smallest change that fits: a profile with a smaller state, else a smaller type."""
    config = config_from_metadata(gguf)
    body, embedding = (gguf.tensors[name].type for name in (_first_projection(config), "token_embd.weight"))
    smaller = body if holds(body, "ternary") or holds(body, "binary") else _ternary_type(config)
    kinds = [(body, embedding)] + [(smaller, EMBEDDING_TYPES[name]) for name in ("f16", "q8_0", "q4_0")]
    options = []
    for kind, of_embedding in kinds:
        if config.d_model % of_embedding.block_size:
            continue
        try:
            layout = tensor_layout(config, low_bit_types(config, kind, of_embedding))
        except UsageError:  # rows of some projections do not divide into its blocks
            continue
        for how in (profile, *(preset.name for preset in preset_of(profile).smaller())):
            option = _need(gguf, config, layout, how, states, compiles)
            name = (
                "" if (kind, of_embedding) == (body, embedding) else f"{kind.name} with a {of_embedding.name} embedding"
            )
            words = [word for word in (name, f"--profile {how}" if how != profile else "") if word]
            if option.total < own.total:
                options.append((option.total, " and ".join(words)))
    if not options:
        return "no smaller type is left"
    for total, how in options:
        if total <= limit:
            return f"{how} needs {_mb(total)} MB"
    total, how = min(options)
    return f"the least, {how}, needs {_mb(total)} MB"


def _first_projection(config: Model) -> str:
    return config.tensors[config.projections[0]].gguf


def _ternary_type(config: Model) -> GGMLType:
    wide = all(config.tensors[name].shape[-1] % GGMLType.TQ2_0.block_size == 0 for name in config.projections)
    return GGMLType.TQ2_0 if wide else GGMLType.Q2_0


def _scratch(config: Model) -> int:
    """Bytes of the working arrays: what a block's products read and write, what its convolution writes, logits, and what is
    kept of drafted tokens (twice the channels of a convolution at most).
    """
    most = 0
    for branch in {branch for block in config.blocks for branch in block.branches}:
        matrices = [spec.shape for spec in branch.tensors() if spec.low_bit or spec.matrix]
        convolved = sum(spec.shape[-1] for spec in branch.states() if not spec.recurrent)
        values = 9 * max(k for _, k in matrices) + 4 * sum(n for n, _ in matrices) + 4 * convolved
        most = max(most, values)
    drafted = sum(spec.shape[-1] for b in config.blocks for a in b.branches for spec in a.states() if not spec.grows)
    return CHUNK * most + 8 * config.vocab_size + MOST * (8 * drafted + 4 * config.vocab_size)


def _need(gguf: GGUFFile, config: Model, layout: Layout, profile: str, states: int, compiles: int) -> Need:
    recorded, block = gguf.metadata.get(GROUP_SIZE_KEY), layout[_first_projection(config)][1].block_size
    group = recorded if recorded in KINDS["ternary"].group_sizes else max(64, block)
    packed = {name: resident_bytes(shape, kind, group) for name, (shape, kind) in layout.items()}
    stored = {name: _stored_bytes(shape, kind) for name, (shape, kind) in layout.items()}
    weights = sum(packed.values())
    ends = [packed[name] + stored[name] for name in ("token_embd.weight", "output.weight") if name in packed]
    layers = max(packed[name] + stored[name] for name in packed if name.startswith("blk."))
    positions = context_limit(config.context_length) if config.context_length else POSITIONS
    arrays = state_arrays(config, preset_of(profile))
    state = sum(array._replace(shape=with_positions(array, positions)).nbytes for array in arrays)
    tokenizer = gguf.metadata.get(TOKENIZER_JSON_KEY)
    other = (
        FIXED
        + compiles * COMPILER
        + _scratch(config)
        + any(array.grows for array in arrays) * default_threads() * 4 * SCORES * positions
        + TOKENIZER * (len(tokenizer) if isinstance(tokenizer, str) else 0)
    )
    return Need(weights, states * state, other, max(sum(ends), weights + PACKERS * layers))


def resident_bytes(shape: tuple[int, ...], kind: GGMLType, group: int) -> int:
    """Bytes of a tensor in memory (`kernels.packed`): 16 rows side by side; TQ1_0 is unpacked to two bits a weight."""
    n, k = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    rows = -(-n // 16) * 16
    if any(holds(kind, codes) for codes in KINDS):
        return rows * (k // 4 + 2 * (k // group))
    if container(kind).decode_codes is not None:
        return rows * kind.row_bytes(k)
    return n * k * (2 if kind is GGMLType.F16 and k >= 16 else 4)  # small tensors become fp32, and BF16 does


def _stored_bytes(shape: tuple[int, ...], kind: GGMLType) -> int:
    return int(np.prod(shape[:-1], dtype=np.int64)) * kind.row_bytes(shape[-1])


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"
