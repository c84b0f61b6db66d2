"""A model as data: an embedding, residual blocks of branches, a norm and a head (design: docs/adding.md).

spec.py       Model, Block, and what a branch's tables are made of
branches/     a file a branch: its dimensions, its tensors, its states
dialects/     a file a way of describing a model: config.json and GGUF keys <-> Model
"""

from __future__ import annotations

from tmexport.model.dialects import load_config, parse_config
from tmexport.model.dialects.llama import llama_model
from tmexport.model.dialects.mamba1 import mamba1_model
from tmexport.model.dialects.mamba2 import mamba2_model
from tmexport.model.spec import Block, Branch, Model, ModelTensor, StateSpec, TensorSpec

__all__ = [
    "Block",
    "Branch",
    "Model",
    "ModelTensor",
    "StateSpec",
    "TensorSpec",
    "llama_model",
    "load_config",
    "mamba1_model",
    "mamba2_model",
    "parse_config",
]
