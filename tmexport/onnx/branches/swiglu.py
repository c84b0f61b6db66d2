"""The gated MLP as ONNX nodes; in the custom form what lies between its products is one node, so that kernels can give its bits."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from tmexport.model.branches.mlp import SwiGLU
from tmexport.onnx.builder import Builder
from tmexport.onnx.forms import PROFILE, Portable
from tmexport.onnx.functions import function
from tmexport.onnx.mathematics import silu
from tmexport.onnx.names import DOMAIN, GraphState


def portable(form: Portable, c: SwiGLU, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The branch of normalised x [B, T, d_model]. weights: initialisers by role."""
    gate, up = form.product(x, weights["gate_proj"]), form.product(x, weights["up_proj"])
    return form.product(form.b.op("Mul", silu(form.b, gate), up), weights["down_proj"])


def custom(form: Portable, c: SwiGLU, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The same with one node between the products."""
    gate, up = form.product(x, weights["gate_proj"]), form.product(x, weights["up_proj"])
    gated = form.b.op("SwiGLU", gate, up, domain=DOMAIN, profile=PROFILE)
    return form.product(gated, weights["down_proj"])


WRITERS = {"portable": portable, "custom": custom, "ort": portable}


def functions(c: SwiGLU, opset: int) -> list[onnx.FunctionProto]:
    """The body of the custom form's operator."""
    b = Builder(in_function=True)
    b.op("Mul", silu(b, "gate"), "up", out="y")
    return [function("SwiGLU", ("gate", "up"), ("y",), b, opset, ("profile",))]
