"""ONNX: one graph for prefill and decode, in three forms (docs/onnx.md).

    from tmexport.onnx import OrtModel
    model = OrtModel.load("model.onnx", threads=2)
    for token in model.generate([1, 2, 3], max_tokens=16):
        print(token)

Importing this package imports neither onnx nor onnxruntime; its names do when they are first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["OrtModel", "register_kernels"]


def __getattr__(name: str) -> Any:
    if name == "OrtModel":
        from tmexport.onnx.ort_model import OrtModel

        return OrtModel
    if name == "register_kernels":
        from tmexport.onnx.kernels import register_kernels

        return register_kernels
    raise AttributeError(f"module 'tmexport.onnx' has no attribute {name!r}")
