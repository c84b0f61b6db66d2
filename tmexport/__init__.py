"""Lossless export of ternary Mamba-2 checkpoints to GGUF and ONNX.

Importing the package costs nothing: numpy, click and the rest are imported where they are used.
"""

__version__ = "0.1.0"
