"""A file a family of models, which says what its config.json files and its GGUF keys mean; here they are put together.

An addition is a file with READERS (config.json -> Model) and a FAMILY (what the model is called in both formats), and its
two lines below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmexport.errors import ConfigError
from tmexport.files import LORA, file_in, read_text
from tmexport.model.dialects import falcon_h1, granite_hybrid, llama, mamba1, mamba2, tmexport_mamba2
from tmexport.model.dialects.reading import Family
from tmexport.model.spec import Model

_LARGEST_FILE = 2**20
_MODULES = (mamba1, mamba2, tmexport_mamba2, granite_hybrid, falcon_h1, llama)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def family_of(name: object) -> Family:
    """The family of this name, which is GGUF's general.architecture too.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"the architecture is {name!r}; expected {' or '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def load_config(folder: Path | str) -> tuple[Model, dict[str, Any]]:
    """The model that `folder`/config.json describes, and the parsed file itself.

    Raises:
        ConfigError: the file is missing, is not JSON, or describes a model that cannot be exported.
        CheckpointError: the file is a link that leaves the folder, or not a file.
    """
    path = Path(folder) / "config.json"
    if not path.exists() and (path.parent / "adapter_config.json").exists():
        raise ConfigError(f"{folder}: {LORA}")
    if not path.exists():
        cache = (path.parent / "snapshots").is_dir()  # Hugging Face's
        which = "; its snapshots/ holds the checkpoints, a folder a revision: name one of those" if cache else ""
        raise ConfigError(f"{path}: no such file; expected a checkpoint folder with a config.json{which}")
    try:
        raw = json.loads(read_text(file_in(folder, "config.json"), _LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}; expected a JSON object")
    try:
        return parse_config(raw), raw
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> Model:
    """A config.json of any dialect as a Model; anything that would change the arithmetic is refused.

    Raises:
        ConfigError: no dialect knows it, or it describes a model that cannot be represented.
    """
    for module in _MODULES:
        for reads, parse in module.READERS:
            if reads(raw):
                return parse(raw)
    known = ", ".join(module.DESCRIBED for module in _MODULES)
    if isinstance(raw.get("model_type"), str):
        raise ConfigError(f"describes a model of another type: model_type is {raw['model_type']!r}; expected {known}")
    raise ConfigError(f"model_type is {raw.get('model_type')!r}; expected {known}")
