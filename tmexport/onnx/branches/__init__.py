"""A file a branch: how each form writes it, and the functions of the custom form that it alone uses."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from tmexport.errors import UsageError

MODULES = {kind: f"tmexport.onnx.branches.{kind}" for kind in ("mamba1", "mamba2", "attention", "swiglu")}


def branch_module(kind: str) -> ModuleType:
    """The module of a branch: WRITERS (by form) and functions(branch, opset).

    Raises:
        UsageError: ONNX has none for this kind.
    """
    if kind not in MODULES:
        raise UsageError(f"a branch of kind {kind!r} cannot be written to ONNX; expected one of {', '.join(MODULES)}")
    return import_module(MODULES[kind])
