"""Files of `tmexport onnx` run by onnxruntime: OrtModel, and the custom form's operators with the runtime's own bits.

    from runtime_ref.ort import OrtModel
    model = OrtModel.load("model.onnx", threads=2)
    for token in model.generate([1, 2, 3], max_tokens=16):
        print(token)

model.py        OrtModel and its state
custom_ops.py   register_kernels: the operators of the domain `tmexport`; their Python functions, for onnxruntime-extensions
native.py       the same as onnxruntime's own; plans.py: what each is made of; compute.py is what a run calls, parts.py how its threads
                share it, layouts.py its phases, interface.py onnxruntime's C interface, shim.py the library that it loads,
                mapped.py weights left in their file, fused.py blocks as one node
operators.py    the Python functions' kernels; packing.py: weights in the kernels' layout

Importing this package imports neither onnxruntime nor Numba; its names do when they are first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["OrtModel", "register_kernels"]


def __getattr__(name: str) -> Any:
    if name == "OrtModel":
        from runtime_ref.ort.model import OrtModel

        return OrtModel
    if name == "register_kernels":
        from runtime_ref.ort.custom_ops import register_kernels

        return register_kernels
    raise AttributeError(f"module 'runtime_ref.ort' has no attribute {name!r}")
