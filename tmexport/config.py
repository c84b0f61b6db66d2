"""The old names of `tmexport.model`, until the last import of them has moved."""

from __future__ import annotations

from tmexport.model import load_config, mamba2_model, parse_config

Mamba2Config = mamba2_model

__all__ = ["Mamba2Config", "load_config", "parse_config"]
