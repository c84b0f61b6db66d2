"""Run a low-bit Mamba-2, Mamba-1, hybrid or Llama-like GGUF on a CPU: `Model.load(path)`, and the definition of "correct" (`runtime_ref.reference`).

from runtime_ref import Model
model = Model.load("model.gguf")
for token in model.generate([1, 2, 3], max_tokens=16):
    print(token)
"""

from __future__ import annotations

from typing import Any

__all__ = ["Model", "State"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from runtime_ref import model

        return getattr(model, name)
    raise AttributeError(f"module 'runtime_ref' has no attribute {name!r}")
