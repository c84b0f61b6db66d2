"""Packages that only some commands need; pyproject.toml's optional dependencies name them."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from tmexport.errors import UsageError

OURS = ("tmexport", "qat", "runtime_ref", "zero_shot")


def import_with(extra: str, module: str) -> ModuleType:
    """Import one of our modules that needs the packages of `extra`.

    Raises:
        UsageError: one of those packages is not installed, or OpenMP, which torch brings, cannot read one of its variables.
    """
    try:
        return _import_checking_openmp(module) if extra else importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not extra or package in OURS:
            raise
        raise UsageError(f"the package {package} is not installed; run: pip install 'tmexport[{extra}]'") from None


def _import_checking_openmp(module: str) -> ModuleType:
    """libgomp says on stderr, when it is loaded, which environment variable it cannot read, and goes on without it."""
    if not any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):
        return importlib.import_module(module)
    from tmexport.library_errors import lines_on_stderr  # tempfile, which --help does without

    with lines_on_stderr() as said:
        imported = importlib.import_module(module)
    for line in said:
        if line.startswith("libgomp: ") and "environment variable" in line:
            name = line.split()[-1]
            raise UsageError(
                f"{name} is {os.environ.get(name, '')!r}, which OpenMP cannot read; correct it, or unset it"
            )
    os.write(2, "".join(f"{line}\n" for line in said).encode())  # OMP_DISPLAY_ENV
    return imported
