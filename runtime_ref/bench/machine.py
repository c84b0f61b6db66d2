"""What the numbers were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from runtime_ref.kernels.isa import select


def machine() -> dict[str, object]:
    """The processor, the instruction set in use and the library versions."""
    import numba

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    isa = type(select()).__name__.lower()
    return {"cpu": name, "isa": isa, "numba": numba.__version__, "numpy": np.__version__, "python": platform.python_version()}  # fmt: skip
