"""What the graph's inputs, outputs and metadata are called.

The state is the same in every form of the file, so a state made by one can be continued by another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tmexport.errors import ConfigError, TmexportError
from tmexport.model import Block, Model, parse_config

DOMAIN = "tmexport"
DOMAIN_VERSION = 1
MICROSOFT = "com.microsoft"
FORMAT_VERSION = 1
IO_NAMES = ("tmexport", "genai")
FORMS = ("ort", "portable", "custom")
EMBEDDING_TYPES = ("q8", "f16", "f32")

# past and present, of a state by its name and its block
_TEMPLATES: dict[str, dict[str, tuple[str, str]]] = {
    "tmexport": {state: (f"past_{state}.{{}}", f"present_{state}.{{}}") for state in ("conv", "ssm")},
    # onnxruntime-genai's model builder, hybrid models (genai_config.json: past_conv_names, past_recurrent_names)
    "genai": {
        "conv": ("past_key_values.{}.conv_state", "present.{}.conv_state"),
        "ssm": ("past_key_values.{}.recurrent_state", "present.{}.recurrent_state"),
    },
}


_IN_PLACE = {"mamba2": ("ssm",)}  # LinearAttention copies the state first and then works on the copy


class OnnxError(TmexportError):
    """An ONNX file, or an input to it, is not what it should be."""


@dataclass(frozen=True)
class GraphState:
    """A state of one block: what it is called as an input, past, and as an output, present; its shape without the batch.

    in_place: whether the ort form's operator may be given one buffer for both.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    in_place: bool


def block_states(block: Block, number: int, style: str = "tmexport") -> dict[str, GraphState]:
    """The states of a block by name; `style` is one of IO_NAMES.

    The last two axes are exchanged against the table's: the convolution's inputs are [channels, time], as in Hugging Face.
    """
    states = {}
    for branch in block.branches:
        for state in branch.states():
            past, present = (template.format(number) for template in _TEMPLATES[style][state.name])
            shape = (*state.shape[:-2], state.shape[-1], state.shape[-2])
            states[state.name] = GraphState(past, present, shape, state.name in _IN_PLACE.get(branch.kind, ()))
    return states


def model_states(model: Model, style: str = "tmexport") -> list[GraphState]:
    """The states of all blocks, in the order of the graph's inputs."""
    return [state for i, block in enumerate(model.blocks) for state in block_states(block, i, style).values()]


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
    """What a file says about itself in its metadata_props."""

    config: Model
    form: str
    group_size: int
    embedding_type: str
    io_names: str
    logits: str

    def to_metadata(self) -> dict[str, str]:
        return {
            "tmexport.version": str(FORMAT_VERSION),
            "tmexport.config": json.dumps(self.config.to_hf(), sort_keys=True),
            "tmexport.form": self.form,
            "tmexport.group_size": str(self.group_size),
            "tmexport.embedding_type": self.embedding_type,
            "tmexport.io_names": self.io_names,
            "tmexport.logits": self.logits,
        }


def info_from_metadata(metadata: Mapping[str, str], path: object) -> ModelInfo:
    """The inverse of `ModelInfo.to_metadata`.

    Raises:
        OnnxError: the file was not written by tmexport, or by a version this one does not know.
    """
    if "tmexport.version" not in metadata:
        raise OnnxError(f"{path}: has no tmexport metadata; expected a file written by `tmexport onnx`")
    if metadata["tmexport.version"] != str(FORMAT_VERSION):
        raise OnnxError(
            f"{path}: format version {metadata['tmexport.version']!r}; this release reads {FORMAT_VERSION}; install a newer tmexport"
        )
    try:
        info = ModelInfo(
            config=parse_config(json.loads(metadata["tmexport.config"])),
            form=metadata["tmexport.form"],
            group_size=int(metadata["tmexport.group_size"]),
            embedding_type=metadata["tmexport.embedding_type"],
            io_names=metadata["tmexport.io_names"],
            logits=metadata["tmexport.logits"],
        )
    except (KeyError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise OnnxError(f"{path}: the tmexport metadata is damaged: {error}") from None
    allowed = {"form": FORMS, "embedding_type": EMBEDDING_TYPES, "io_names": IO_NAMES, "logits": ("all", "last")}
    for field in fields(info):
        if field.name in allowed and getattr(info, field.name) not in allowed[field.name]:
            raise OnnxError(f"{path}: {field.name} is {getattr(info, field.name)!r}; expected {allowed[field.name]}")
    return info
