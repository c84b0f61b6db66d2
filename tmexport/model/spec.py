"""Model, Block, and the tables that a branch is described by; everything else reads these and lists nothing again.

x <- x + r * (branch_1(norm(x)) + branch_2(norm(x)) + ...)       for every block, from the embedding to the final norm and the head

A family's own multipliers of a branch's input or output are folded into its weights when they are read (`Family.folds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

from tmexport.errors import ConfigError

LARGEST_DIMENSION = 2**24  # far above any model, far below an overflow: stops absurd values before they are used
MOST_POSITIONS = 2**31
MOST_BLOCKS, MOST_TOKENS = 1024, 2**21  # lists of tensors and of tokens are as long as these
NEG_EXP = "neg_exp"  # a transform: the file holds -exp(x), taken in fp64 and rounded once to fp32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a branch.

    role: what it is called everywhere ("in_proj"); hf: its name in a checkpoint, after the branch's prefix; gguf: its name
    in a GGUF, after "blk.N."; shape: in the checkpoint; gguf_shape: numpy order, where it differs; transform: None or
    NEG_EXP; low_bit: a matrix that may be stored as codes and scales; matrix: one that may not, and is fp16 in a GGUF;
    rotated: the heads whose rows RoPE turns, whose halves a GGUF of some families interleaves (`Names.interleaved`).
    """

    role: str
    hf: str
    gguf: str
    shape: Shape
    gguf_shape: Shape = ()
    transform: str | None = None
    low_bit: bool = False
    matrix: bool = False
    rotated: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gguf_shape", self.gguf_shape or self.shape)


@dataclass(frozen=True)
class StateSpec:
    """What a branch remembers of one sequence: shape; recurrent: in the number format of the preset's state, else fp32;
    grows: the shape is that of one position, and every position of the sequence has one.
    """

    name: str
    shape: Shape
    recurrent: bool = False
    grows: bool = False

    @property
    def size(self) -> int:
        """How many numbers (of a position, if it grows)."""
        product = 1
        for length in self.shape:
            product *= length
        return product


class Branch(Protocol):
    """A mixer or an MLP: its dimensions, and what they say of its tensors and states. Branches are frozen dataclasses."""

    @property
    def kind(self) -> str:
        """Its name in every table: "mamba2"."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Its tensors in the order of the file."""

    def states(self) -> tuple[StateSpec, ...]:
        """Its states."""

    def dimensions(self) -> dict[str, int]:
        """Its dimensions by the names that messages and `inspect` use."""


@dataclass(frozen=True)
class Block:
    """One norm, and the branches that read it; multiplier: of their sum, before it is added to the residual stream."""

    branches: tuple[Branch, ...]
    multiplier: float = 1.0


@dataclass(frozen=True)
class ModelTensor(TensorSpec):
    """A tensor of the whole model: a TensorSpec with names in full; block is None outside the blocks.

    hf: its name everywhere in this program (torch, checkpoints in memory); file: its name in a checkpoint folder, where the
    family's class in transformers calls it otherwise; part: (which, of how many) equal parts of that tensor's rows it is.
    rotated: as in TensorSpec, where a GGUF of this family interleaves.
    """

    block: int | None = None
    file: str = ""
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "file", self.file or self.hf)


@dataclass(frozen=True)
class Files:
    """What a family's class in transformers calls its tensors, where that is not what this program calls them.

    norms: of each block of a layer in turn, and branches: the prefix of a kind's tensors, both after the layer's prefix;
    other: names after the layer's prefix of single roles, and which part of how many of that tensor's rows the role is.
    """

    embedding: str
    final_norm: str
    layer: str  # with {} for the layer's number
    norms: tuple[str, ...]
    branches: Mapping[str, str]
    other: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)

    def of(self, layer: int, branch: Branch, spec: TensorSpec) -> tuple[str, tuple[int, int]]:
        """The name of the tensor in a checkpoint that holds this one, and which part of it this is."""
        prefix = self.layer.format(layer)
        if spec.role in self.other:
            name, which, of = self.other[spec.role]
            return prefix + name, (which, of)
        return prefix + self.branches[branch.kind] + spec.hf, (0, 1)


@dataclass(frozen=True)
class Names:
    """What a family calls things: (this program's, GGUF's) names, and the prefix of a branch inside its block.

    branch: None: the branch's kind, which keeps apart the branches of one block. norms: of each block of a layer in turn, in
    a GGUF, where a layer has as many blocks. interleaved: its GGUF turns neighbouring rows of a head together (RoPE of the
    kind NORM), and this program and transformers those of its two halves.
    """

    embedding: tuple[str, str]
    final_norm: tuple[str, str]
    head: tuple[str, str]
    block: tuple[str, str]  # with {} for the number of the block, and of the layer
    norm: str
    norms: tuple[str, ...]
    branch: str | None = "mixer."
    files: Files | None = None
    interleaved: bool = False

    def branch_name(self, branch: Branch) -> str:
        """What a branch is called inside its block."""
        return self.branch.removesuffix(".") if self.branch is not None else branch.kind


@dataclass(frozen=True)
class Model:
    """A language model. vocab_size counts the rows of the embedding, padding rows included; family: a key of FAMILIES.

    embedding_multiplier: of the rows of the embedding where they enter the first block; logits_divisor: of the logits;
    context_length: positions that it was trained for, None without a limit.
    """

    d_model: int
    vocab_size: int
    blocks: tuple[Block, ...]
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    family: str = "mamba2"
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    context_length: int | None = None

    def __post_init__(self) -> None:
        whole_number("d_model", self.d_model)
        whole_number("vocab_size", self.vocab_size, MOST_TOKENS)
        whole_number("n_layer", self.n_layer, MOST_BLOCKS)
        if not (isinstance(self.rms_eps, float) and 0.0 < self.rms_eps < 1.0):
            raise ConfigError(f"the norm's epsilon is {self.rms_eps!r}; expected a number between 0 and 1")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise ConfigError(
                    f"{name} is {shown(value)}; expected a token id below the vocabulary of {self.vocab_size}"
                )
        for multiplier in (self.embedding_multiplier, self.logits_divisor, *(b.multiplier for b in self.blocks)):
            if not (isinstance(multiplier, float) and 0.0 < multiplier < 1e30):
                raise ConfigError(f"a multiplier is {shown(multiplier)}; expected a positive number")
        if self.context_length is not None:
            whole_number("context_length", self.context_length, MOST_POSITIONS)
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tied embeddings are {shown(self.tie_embeddings)}; expected true or false")

    @property
    def n_layer(self) -> int:
        return len(self.blocks)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the Hugging Face class that loads it."""
        from tmexport.model.dialects import family_of

        return family_of(self.family).to_hf(self)

    @cached_property
    def names(self) -> Names:
        """What its family calls its tensors."""
        from tmexport.model.dialects import family_of

        return family_of(self.family).names

    @cached_property
    def tensors(self) -> Mapping[str, ModelTensor]:
        """Every tensor by its Hugging Face name, in the order of the file."""
        names, matrix = self.names, (self.vocab_size, self.d_model)
        embedding, final_norm = ("", "") if names.files is None else (names.files.embedding, names.files.final_norm)
        found = [ModelTensor("embedding", *names.embedding, matrix, low_bit=True, file=embedding)]
        for number, block in enumerate(self.blocks):
            found += _tensors_of(block, number, names, self.d_model)
        vector = (self.d_model,)
        found.append(ModelTensor("final_norm", *names.final_norm, vector, file=final_norm))
        if not self.tie_embeddings:
            found.append(ModelTensor("head", *names.head, matrix, low_bit=True))
        return {tensor.hf: tensor for tensor in found}

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Hugging Face names of the matrices inside the blocks that may be low-bit, in the order of the file."""
        return tuple(name for name, t in self.tensors.items() if t.low_bit and t.block is not None)

    def dimensions(self) -> dict[str, Any]:
        """Every dimension by name, for messages, comparison and JSON; those of a block only where blocks differ."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "blocks"}
        for name in ("embedding_multiplier", "logits_divisor", "context_length"):
            if own[name] == getattr(type(self), name):  # most models have none
                del own[name]
        result: dict[str, Any] = {"d_model": own.pop("d_model"), "n_layer": self.n_layer}
        result["vocab_size"] = own.pop("vocab_size")
        if len(set(self.blocks)) == 1:
            for branch in self.blocks[0].branches:
                result |= {"kind": branch.kind, **branch.dimensions()}
        else:
            result["blocks"] = [[{"kind": b.kind, **b.dimensions()} for b in block.branches] for block in self.blocks]
        multipliers = {block.multiplier for block in self.blocks}
        if multipliers != {1.0}:
            result["residual_multiplier"] = (
                multipliers.pop() if len(multipliers) == 1 else [b.multiplier for b in self.blocks]
            )
        return result | own


def _tensors_of(block: Block, number: int, names: Names, d_model: int) -> list[ModelTensor]:
    """Each branch's tensors, with the block's norm where a checkpoint has it: before them."""
    layer, place = divmod(number, len(names.norms))
    hf, gguf = names.block[0].format(number), names.block[1].format(layer)
    files = names.files
    norm = ModelTensor("norm", hf + names.norm, gguf + names.norms[place], (d_model,), block=number)
    found = [norm if files is None else replace(norm, file=files.layer.format(layer) + files.norms[place])]
    for branch in block.branches:
        prefix = f"{hf}{names.branch_name(branch)}."
        for spec in branch.tensors():
            file, part = ("", (0, 1)) if files is None else files.of(layer, branch, spec)
            rotated = spec.rotated if names.interleaved else None
            full = {"hf": prefix + spec.hf, "gguf": gguf + spec.gguf, "rotated": rotated}
            found.append(ModelTensor(**vars(spec) | full, block=number, file=file, part=part))
    return found


def whole_number(name: str, value: Any, largest: int = LARGEST_DIMENSION, smallest: int = 1) -> None:
    """Raises ConfigError unless `value` is a whole number from `smallest` to `largest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise ConfigError(f"{name} is {shown(value)}; expected a whole number from {smallest} to {largest}")


def shown(value: Any) -> str:
    """A value for a message; the digits of a huge whole number cannot be printed (and take forever)."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)
