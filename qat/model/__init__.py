"""The model in torch.

lm.py         embedding, residual blocks, norm and head; which module stands for which kind of branch
mamba2.py     the Mamba-2 mixer; ssd.py, its scan
mamba1.py     the Mamba-1 mixer, its scan a step at a time
attention.py  attention; mlp.py, the gated MLP
branch.py     what the module of every kind of branch has
norm.py       the norm before every block and before the head
"""

from __future__ import annotations

from qat.model.lm import MODULES, LanguageModel, ResidualBlock, load_model

__all__ = ["MODULES", "LanguageModel", "ResidualBlock", "load_model"]
