"""Packages that only some commands need; pyproject.toml's optional dependencies name them."""

from __future__ import annotations

import importlib
from types import ModuleType

from tmexport.errors import UsageError

OURS = ("tmexport", "qat", "runtime_ref", "zero_shot")


def import_with(extra: str, module: str) -> ModuleType:
    """Import one of our modules that needs the packages of `extra`.

    Raises:
        UsageError: one of those packages is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not extra or package in OURS:
            raise
        raise UsageError(f"the package {package} is not installed; run: pip install 'tmexport[{extra}]'") from None
