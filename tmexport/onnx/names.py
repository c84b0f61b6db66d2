"""What the graph's inputs, outputs and metadata are called, and the shapes of the state.

The state is the same in every form of the file, so a state made by one can be continued by another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tmexport.config import Mamba2Config
from tmexport.errors import ConfigError, TmexportError

DOMAIN = "tmexport"
DOMAIN_VERSION = 1
MICROSOFT = "com.microsoft"
FORMAT_VERSION = 1
IO_NAMES = ("tmexport", "genai")
FORMS = ("ort", "portable", "custom")
EMBEDDING_TYPES = ("q8", "f16", "f32")

_TEMPLATES = {
    "tmexport": ("past_conv.{}", "past_ssm.{}", "present_conv.{}", "present_ssm.{}"),
    # onnxruntime-genai's model builder, hybrid models (genai_config.json: past_conv_names, past_recurrent_names)
    "genai": (
        "past_key_values.{}.conv_state",
        "past_key_values.{}.recurrent_state",
        "present.{}.conv_state",
        "present.{}.recurrent_state",
    ),
}


class OnnxError(TmexportError):
    """An ONNX file, or an input to it, is not what it should be."""


@dataclass(frozen=True)
class StateNames:
    """Names of a layer's state: inputs past_*, outputs present_*."""

    past_conv: str
    past_ssm: str
    present_conv: str
    present_ssm: str


def state_names(layer: int, style: str = "tmexport") -> StateNames:
    """The four names of a layer; `style` is one of IO_NAMES."""
    return StateNames(*(template.format(layer) for template in _TEMPLATES[style]))


def conv_state_shape(config: Mamba2Config) -> tuple[int, int]:
    """[channels, d_conv - 1]: the last inputs of the convolution, oldest first; channels are x, B, C."""
    return config.conv_dim, config.d_conv - 1


def ssm_state_shape(config: Mamba2Config) -> tuple[int, int, int]:
    """[heads, d_state, headdim]: Hugging Face's cache with its last two axes exchanged."""
    return config.n_heads, config.d_state, config.headdim


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

    config: Mamba2Config
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
    from tmexport.config import parse_config

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
