"""What the graph's inputs, outputs and metadata are called.

The state is the same in every form of the file, so a state made by one can be continued by another.

Version 1 of the metadata: recurrent layers alone, one a block, with every projection ternary in groups of one size; version 2
is every other model, and says how the weights of each role are stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tmexport.errors import CheckpointError, ConfigError, TmexportError
from tmexport.model import Block, Model, parse_config
from tmexport.quantization import Stored, stored_form
from tmexport.types import KINDS

DOMAIN = "tmexport"
DOMAIN_VERSION = 1
MICROSOFT = "com.microsoft"
VERSION_1, VERSION_2 = 1, 2
IO_NAMES = ("tmexport", "genai", "transformers.js")
FORMS = ("ort", "portable", "custom")
EMBEDDING_TYPES = ("q8", "f16", "f32")
DENSE_TYPES = ("f16", "f32")
_RECURRENT = ("mamba1", "mamba2")

# past and present, of a state by its name and its layer
TEMPLATES: dict[str, dict[str, tuple[str, str]]] = {
    "tmexport": {state: (f"past_{state}.{{}}", f"present_{state}.{{}}") for state in ("conv", "ssm", "k", "v")},
    # onnxruntime-genai's model builder, hybrid models
    "genai": {
        "conv": ("past_key_values.{}.conv_state", "present.{}.conv_state"),
        "ssm": ("past_key_values.{}.recurrent_state", "present.{}.recurrent_state"),
        "k": ("past_key_values.{}.key", "present.{}.key"),
        "v": ("past_key_values.{}.value", "present.{}.value"),
    },
}
# Of Granite-4.0-H and Falcon-H1 (transformers.js, src/configs.js, getCacheNames), and what it calls the batch of a state
TEMPLATES["transformers.js"] = TEMPLATES["genai"] | {state: TEMPLATES["tmexport"][state] for state in ("conv", "ssm")}
_BATCH = {"transformers.js": "batch_size"}


_IN_PLACE = {"mamba2": ("ssm",)}  # LinearAttention copies the state first and then works on the copy


class OnnxError(TmexportError):
    """An ONNX file, or an input to it, is not what it should be."""


@dataclass(frozen=True)
class GraphState:
    """A state of one block: what it is called as an input, past, and as an output, present; its shape without the batch.

    in_place: whether the ort form's operator may be given one buffer for both. grows: every position has one of these shapes. batch:
    what the first dimension is called.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    in_place: bool
    grows: bool = False
    batch: str = "batch"

    def sizes(self, batch: int, positions: int) -> tuple[int, ...]:
        """batch, *shape; of one that grows batch, heads, positions, width."""
        first, *rest = self.shape
        return (batch, first, *([positions] if self.grows else []), *rest)

    def dims(self, positions: str) -> list[int | str]:
        """The same with names for the batch and the positions."""
        first, *rest = self.shape
        return [self.batch, first, *([positions] if self.grows else []), *rest]


def block_states(block: Block, layer: int, style: str = "tmexport") -> dict[str, GraphState]:
    """The states of a block by name; layer: the number in their names; `style` is one of IO_NAMES.

    The last two axes of a constant one are exchanged against the table's: the convolution's inputs are [channels, time], as
    in Hugging Face.
    """
    states = {}
    for branch in block.branches:
        for state in branch.states():
            past, present = (template.format(layer) for template in TEMPLATES[style][state.name])
            turned = (*state.shape[:-2], state.shape[-1], state.shape[-2])
            in_place = state.name in _IN_PLACE.get(branch.kind, ())
            shape = state.shape if state.grows else turned
            states[state.name] = GraphState(past, present, shape, in_place, state.grows, _BATCH.get(style, "batch"))
    return states


def layer_of(model: Model, block: int) -> int:
    """The number of the layer that a block belongs to."""
    return block // len(model.names.norms)


def model_states(model: Model, style: str = "tmexport") -> list[GraphState]:
    """The states of all blocks, in the order of the graph's inputs."""
    found = [block_states(block, layer_of(model, i), style) for i, block in enumerate(model.blocks)]
    return [state for states in found for state in states.values()]


def tokenizer_path(model: Path) -> Path:
    """model.onnx -> model.tokenizer.json."""
    return model.with_name(f"{model.stem}.tokenizer.json")


def config_path(model: Path) -> Path:
    """model.onnx -> model.config.json."""
    return model.with_name(f"{model.stem}.config.json")


def data_path(model: Path) -> Path:
    """model.onnx -> model.onnx.data, where the weights of a model over protobuf's 2 GB are."""
    return model.with_name(f"{model.name}.data")


@dataclass(frozen=True)
class ModelInfo:
    """What a file says about itself in its metadata_props.

    weights: how the matrices of a role are stored; those that may be low-bit and are not here are of dense_type in the
    blocks, and of embedding_type outside.
    """

    config: Model
    form: str
    weights: Mapping[str, Stored]
    embedding_type: str
    io_names: str
    logits: str
    dense_type: str = "f16"

    @property
    def group_size(self) -> int | None:
        """The smallest of the blocks' projections that are codes in groups."""
        inside = projection_roles(self.config)
        sizes = [s.group_size for role, s in self.weights.items() if role in inside and not KINDS[s.kind].in_blocks]
        return min(sizes, default=None)

    def to_metadata(self) -> dict[str, str]:
        version = self._version()
        if version == VERSION_1:
            weights = {"tmexport.group_size": str(self.group_size)}
        else:
            forms = {role: {"kind": s.kind, "group_size": s.group_size} for role, s in self.weights.items()}
            weights = {"tmexport.weights": json.dumps(forms), "tmexport.dense_type": self.dense_type}
        return {
            "tmexport.version": str(version),
            "tmexport.config": json.dumps(self.config.to_hf(), sort_keys=True),
            "tmexport.form": self.form,
            **weights,
            "tmexport.embedding_type": self.embedding_type,
            "tmexport.io_names": self.io_names,
            "tmexport.logits": self.logits,
        }

    def _version(self) -> int:
        forms = set(self.weights.values())
        uniform = (
            len(forms) == 1 and forms.pop().kind == "ternary" and set(self.weights) == projection_roles(self.config)
        )
        recurrent = all(len(b.branches) == 1 and b.branches[0].kind in _RECURRENT for b in self.config.blocks)
        return VERSION_1 if uniform and recurrent else VERSION_2


def projection_roles(model: Model) -> set[str]:
    """The roles of the matrices inside the blocks that may be low-bit."""
    return {model.tensors[name].role for name in model.projections}


def info_from_metadata(metadata: Mapping[str, str], path: object) -> ModelInfo:
    """The inverse of `ModelInfo.to_metadata`.

    Raises:
        OnnxError: the file was not written by tmexport, or by a version this one does not know.
    """
    if "tmexport.version" not in metadata:
        raise OnnxError(f"{path}: has no tmexport metadata; expected a file written by `tmexport onnx`")
    if metadata["tmexport.version"] not in (str(VERSION_1), str(VERSION_2)):
        raise OnnxError(
            f"{path}: format version {metadata['tmexport.version']!r}; this release reads {VERSION_1} and {VERSION_2}; install a newer tmexport"
        )
    try:
        config = parse_config(json.loads(metadata["tmexport.config"]))
        info = ModelInfo(
            config=config,
            form=metadata["tmexport.form"],
            weights=_weights(metadata, config),
            embedding_type=metadata["tmexport.embedding_type"],
            io_names=metadata["tmexport.io_names"],
            logits=metadata["tmexport.logits"],
            dense_type=metadata.get("tmexport.dense_type", DENSE_TYPES[0]),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, ConfigError, CheckpointError) as error:
        raise OnnxError(f"{path}: the tmexport metadata is damaged: {error}") from None
    allowed = {"form": FORMS, "embedding_type": EMBEDDING_TYPES, "io_names": IO_NAMES, "logits": ("all", "last")}
    allowed["dense_type"] = DENSE_TYPES
    for field in fields(info):
        if field.name in allowed and getattr(info, field.name) not in allowed[field.name]:
            raise OnnxError(f"{path}: {field.name} is {getattr(info, field.name)!r}; expected {allowed[field.name]}")
    return info


def _weights(metadata: Mapping[str, str], config: Model) -> dict[str, Stored]:
    """Raises CheckpointError for kinds and group sizes that cannot be."""
    if metadata["tmexport.version"] == str(VERSION_1):
        size = int(metadata["tmexport.group_size"])
        return dict.fromkeys(projection_roles(config), stored_form("ternary", size, "the weights"))
    entries = json.loads(metadata["tmexport.weights"]).items()
    return {role: stored_form(entry["kind"], entry["group_size"], role) for role, entry in entries}
