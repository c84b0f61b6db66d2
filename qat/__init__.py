"""Quantisation-aware training of ternary Mamba-2 models with distillation: `python -m qat.train`, `.evaluate`, `.ptq`."""
