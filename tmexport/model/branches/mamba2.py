"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060); names as in mamba_ssm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tmexport.errors import ConfigError
from tmexport.model.spec import NEG_EXP, StateSpec, TensorSpec, whole_number


@dataclass(frozen=True)
class Mamba2:
    """Dimensions. A group of B and C serves n_heads / n_groups consecutive heads; chunk_size matters to training code only.

    gate_norm: whether out_proj reads the norm of y * silu(z), or that product itself. online_hadamard: a power of two: every so
    many neighbouring inputs of out_proj are turned by the Hadamard matrix of that size (Sylvester's, orthonormal); 0: they are not.
    """

    kind: ClassVar[str] = "mamba2"

    d_model: int
    d_inner: int
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    n_groups: int = 1
    chunk_size: int = 256
    gate_norm: bool = True
    online_hadamard: int = 0

    def __post_init__(self) -> None:
        for name in ("d_inner", "d_state", "headdim", "n_groups", "chunk_size"):
            whole_number(name, getattr(self, name))
        whole_number("d_conv", self.d_conv, smallest=2)
        if self.d_inner % self.headdim:
            raise ConfigError(f"d_inner {self.d_inner} is not a multiple of headdim {self.headdim}")
        if self.n_heads % self.n_groups:
            raise ConfigError(f"{self.n_heads} heads cannot be shared by {self.n_groups} groups of B and C")
        if self.online_hadamard:
            whole_number("online_hadamard", self.online_hadamard)
            if self.online_hadamard.bit_count() != 1 or self.d_inner % self.online_hadamard:
                raise ConfigError(
                    f"online_hadamard is {self.online_hadamard}; expected a power of two that divides d_inner {self.d_inner}"
                )

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.n_heads

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Those between the block's norm and its sum (llama.cpp, src/models/mamba2.cpp)."""
        heads, per_group = (self.n_heads,), (self.n_groups, self.d_inner // self.n_groups)
        conv, d_conv = self.conv_dim, self.d_conv
        column = (self.n_heads, 1)
        norm = TensorSpec("gate_norm", "norm.weight", "ssm_norm.weight", (self.d_inner,), per_group)
        return (
            TensorSpec("in_proj", "in_proj.weight", "ssm_in.weight", (self.d_in_proj, self.d_model), low_bit=True),
            TensorSpec("conv_weight", "conv1d.weight", "ssm_conv1d.weight", (conv, 1, d_conv), (conv, d_conv)),
            TensorSpec("conv_bias", "conv1d.bias", "ssm_conv1d.bias", (conv,)),
            TensorSpec("dt_bias", "dt_bias", "ssm_dt.bias", heads),
            TensorSpec("a", "A_log", "ssm_a", heads, column, NEG_EXP),
            TensorSpec("d", "D", "ssm_d", heads, column),
            *((norm,) if self.gate_norm else ()),
            TensorSpec("out_proj", "out_proj.weight", "ssm_out.weight", (self.d_model, self.d_inner), low_bit=True),
        )

    def states(self) -> tuple[StateSpec, ...]:
        """The convolution's last inputs, oldest first, and the state of every head."""
        return (
            StateSpec("conv", (self.d_conv - 1, self.conv_dim)),
            StateSpec("ssm", (self.n_heads, self.headdim, self.d_state), recurrent=True),
        )

    def dimensions(self) -> dict[str, int]:
        """By the names that config.json files use."""
        expand = {"expand": self.d_inner // self.d_model} if self.d_inner % self.d_model == 0 else {}
        own = {"d_inner": self.d_inner, "d_state": self.d_state, "d_conv": self.d_conv, **expand}
        own |= {"headdim": self.headdim, "n_groups": self.n_groups, "chunk_size": self.chunk_size}
        if self.online_hadamard:
            own["online_hadamard"] = self.online_hadamard
        return own if self.gate_norm else own | {"gate_norm": False}
