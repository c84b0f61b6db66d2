"""The Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752); names as in mamba_ssm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tmexport.model.spec import NEG_EXP, StateSpec, TensorSpec, whole_number


@dataclass(frozen=True)
class Mamba1:
    """Dimensions; dt_rank is the width that dt passes through. Every channel has a decay for each of its d_state states."""

    kind: ClassVar[str] = "mamba1"

    d_model: int
    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4

    def __post_init__(self) -> None:
        for name in ("d_inner", "dt_rank", "d_state"):
            whole_number(name, getattr(self, name))
        whole_number("d_conv", self.d_conv, smallest=2)

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Those between the block's norm and its sum (llama.cpp, src/models/mamba.cpp); in_proj's rows are x, then z."""
        inner, states, rank, d_conv = self.d_inner, self.d_state, self.dt_rank, self.d_conv
        return (
            TensorSpec("in_proj", "in_proj.weight", "ssm_in.weight", (2 * inner, self.d_model), low_bit=True),
            TensorSpec("conv_weight", "conv1d.weight", "ssm_conv1d.weight", (inner, 1, d_conv), (inner, d_conv)),
            TensorSpec("conv_bias", "conv1d.bias", "ssm_conv1d.bias", (inner,)),
            TensorSpec("x_proj", "x_proj.weight", "ssm_x.weight", (rank + 2 * states, inner), matrix=True),
            TensorSpec("dt_proj", "dt_proj.weight", "ssm_dt.weight", (inner, rank), matrix=True),
            TensorSpec("dt_bias", "dt_proj.bias", "ssm_dt.bias", (inner,)),
            TensorSpec("a", "A_log", "ssm_a", (inner, states), transform=NEG_EXP),
            TensorSpec("d", "D", "ssm_d", (inner,)),
            TensorSpec("out_proj", "out_proj.weight", "ssm_out.weight", (self.d_model, inner), low_bit=True),
        )

    def states(self) -> tuple[StateSpec, ...]:
        """The convolution's last inputs, oldest first, and the states of every channel."""
        return (
            StateSpec("conv", (self.d_conv - 1, self.d_inner)),
            StateSpec("ssm", (self.d_inner, self.d_state), recurrent=True),
        )

    def dimensions(self) -> dict[str, int]:
        """By the names that config.json files use."""
        expand = {"expand": self.d_inner // self.d_model} if self.d_inner % self.d_model == 0 else {}
        return {
            "d_inner": self.d_inner,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
            **expand,
            "dt_rank": self.dt_rank,
        }
