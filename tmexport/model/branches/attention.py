"""Causal attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) and RoPE (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tmexport.errors import ConfigError
from tmexport.model.spec import StateSpec, TensorSpec, shown, whole_number


@dataclass(frozen=True)
class Attention:
    """Dimensions. A head of keys and values serves n_heads / n_kv_heads consecutive heads of queries.

    scale: of q . k. rope_theta: base of RoPE's frequencies, which turns element i of a head with i + head_dim / 2; None: no
    positions. bias: q, k, v and the output have one.
    """

    kind: ClassVar[str] = "attention"

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope_theta: float | None = 10000.0
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_kv_heads", "head_dim"):
            whole_number(name, getattr(self, name))
        whole_number("n_heads * head_dim", self.n_heads * self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} heads of queries cannot be shared by {self.n_kv_heads} heads of keys and values"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; expected an even number, because RoPE turns pairs")
        for name, value in (("scale", self.scale), ("rope_theta", self.rope_theta)):
            if value is not None and not (isinstance(value, float) and 0.0 < value < 1e30):
                raise ConfigError(f"the attention's {name} is {shown(value)}; expected a positive number")
        if not isinstance(self.bias, bool):
            raise ConfigError(f"attention_bias is {shown(self.bias)}; expected true or false")

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Those between the block's norm and its sum (llama.cpp, src/models/llama.cpp); the output's input is head after head."""
        inner, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        rows = {"q": (inner, self.n_heads), "k": (keys, self.n_kv_heads), "v": (keys, None)}
        found = []
        for name, (length, rotated) in rows.items():
            shape = (length, self.d_model)
            found.append(
                TensorSpec(
                    f"{name}_proj", f"{name}_proj.weight", f"attn_{name}.weight", shape, low_bit=True, rotated=rotated
                )
            )
            if self.bias:
                bias = TensorSpec(f"{name}_bias", f"{name}_proj.bias", f"attn_{name}.bias", (length,), rotated=rotated)
                found.append(bias)
        found.append(TensorSpec("o_proj", "o_proj.weight", "attn_output.weight", (self.d_model, inner), low_bit=True))
        if self.bias:
            found.append(TensorSpec("o_bias", "o_proj.bias", "attn_output.bias", (self.d_model,)))
        return tuple(found)

    def states(self) -> tuple[StateSpec, ...]:
        """The keys, turned to their positions, and the values, of every position."""
        shape = (self.n_kv_heads, self.head_dim)
        return (StateSpec("k", shape, grows=True), StateSpec("v", shape, grows=True))

    def dimensions(self) -> dict[str, Any]:
        """By the names that messages and `inspect` use."""
        names = ("n_heads", "n_kv_heads", "head_dim", "scale", "rope_theta", "bias")
        return {name: getattr(self, name) for name in names}
