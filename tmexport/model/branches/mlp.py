"""The gated MLP, SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tmexport.model.spec import StateSpec, TensorSpec, whole_number


@dataclass(frozen=True)
class SwiGLU:
    """Dimensions: d_ff is the width inside. It remembers nothing."""

    kind: ClassVar[str] = "swiglu"

    d_model: int
    d_ff: int

    def __post_init__(self) -> None:
        whole_number("d_ff", self.d_ff)

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Those between the block's norm and its sum (llama.cpp, build_ffn with LLM_FFN_PAR)."""
        wide = (self.d_ff, self.d_model)
        return (
            TensorSpec("gate_proj", "gate_proj.weight", "ffn_gate.weight", wide, low_bit=True),
            TensorSpec("up_proj", "up_proj.weight", "ffn_up.weight", wide, low_bit=True),
            TensorSpec("down_proj", "down_proj.weight", "ffn_down.weight", (self.d_model, self.d_ff), low_bit=True),
        )

    def states(self) -> tuple[StateSpec, ...]:
        """None."""
        return ()

    def dimensions(self) -> dict[str, int]:
        """By the names that messages and `inspect` use."""
        return {"d_ff": self.d_ff}
