"""The pieces of the graph that differ between the forms: how a norm, a ternary product, a mixer and the head are written.

ort       onnxruntime's own operators (com.microsoft): 2-bit weights times int8 activations
custom    our operators, which are functions of standard ones (functions.py)
portable  the same functions written out: standard operators only
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from tmexport.config import Mamba2Config
from tmexport.onnx import mathematics as m
from tmexport.onnx.builder import Builder
from tmexport.onnx.functions import SCAN_OUTPUTS
from tmexport.onnx.names import DOMAIN, MICROSOFT, StateNames
from tmexport.onnx.weights import ORT_BLOCK, ORT_HEAD_BLOCK

PROFILE = "exact"


@dataclass(frozen=True)
class Layer:
    """Names of a layer's initialisers."""

    norm: str
    in_proj: str
    conv_weight: str
    conv_bias: str
    dt_bias: str
    a: str
    d: str
    gate_norm: str
    out_proj: str


class Portable:
    """Standard operators only, ai.onnx 15 and later."""

    opset = 15

    def __init__(self, b: Builder, config: Mamba2Config, group_size: int) -> None:
        self.b, self.config, self.group_size = b, config, group_size

    @property
    def epsilon(self) -> str:
        """The norms' epsilon as a tensor: an attribute would reach a Python kernel as six decimal digits."""
        return self.b.scalar(self.config.rms_eps)

    def norm(self, x: str, weight: str) -> str:
        return m.rms_norm(self.b, x, weight, self.epsilon, self.config.d_model)

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        """x + y, and its norm."""
        total = self.b.op("Add", x, y, dims=("batch", "time", self.config.d_model))
        return total, self.norm(total, weight)

    def ternary(self, x: str, weight: str, n: int, k: int) -> str:
        """x [B, T, k] times the ternary weight [n, k]."""
        dense = m.unpack_ternary(self.b, *self._codes_scales(weight), self.b.ints(0, -1, self.group_size))
        return m.matmul(self.b, x, dense)

    def in_proj(self, x: str, layer: Layer, n: int, k: int) -> str:
        """[B, T, d_model] -> [B, T, d_in_proj], as the form's mixer takes it."""
        return self.ternary(x, layer.in_proj, n, k)

    def mixer(self, projected: str, layer: Layer, state: StateNames) -> str:
        """[B, T, d_in_proj] -> [B, T, d_inner]; writes present_conv and present_ssm."""
        y = self.b.name("y")
        outputs = (y, state.present_conv, state.present_ssm)
        m.selective_scan(self.b, self.config, *self._scan_inputs(projected, layer, state), outputs=outputs)
        self.b.annotate(y, ("batch", "time", self.config.d_inner))
        return y

    def embed(self, ids: str, weight: str, kind: str) -> str:
        if kind == "q8":
            codes = self.b.op("Gather", f"{weight}.codes", ids, axis=0)
            scales = self.b.op("Gather", f"{weight}.scales", ids, axis=0)
            return m.unpack_q8(self.b, codes, self.b.op("Cast", scales, to=TensorProto.FLOAT), (0, 0))
        rows = self.b.op("Gather", weight, ids, axis=0)
        return rows if kind == "f32" else self.b.op("Cast", rows, to=TensorProto.FLOAT)

    def head(self, x: str, weight: str, kind: str) -> None:
        if kind == "q8":
            m.matmul(self.b, x, m.unpack_q8(self.b, *self._codes_scales(weight), (0,)), out="logits")
        else:
            m.matmul(self.b, x, self._dense(weight, kind), out="logits")

    def _codes_scales(self, weight: str) -> tuple[str, str]:
        return f"{weight}.codes", self.b.op("Cast", f"{weight}.scales", to=TensorProto.FLOAT)

    def _dense(self, weight: str, kind: str) -> str:
        return weight if kind == "f32" else self.b.op("Cast", weight, to=TensorProto.FLOAT)

    def _scan_inputs(self, projected: str, layer: Layer, state: StateNames) -> tuple[str, ...]:
        past = (projected, state.past_conv, state.past_ssm)
        weights = (layer.conv_weight, layer.conv_bias, layer.dt_bias, layer.a, layer.d, layer.gate_norm)
        return (*past, *weights, self.epsilon)


class Custom(Portable):
    """One node of our domain for each function. Scales are cast to fp32 outside: Python kernels cannot take fp16."""

    def norm(self, x: str, weight: str) -> str:
        return self.b.op("RMSNorm", x, weight, self.epsilon, domain=DOMAIN, profile=PROFILE)

    def ternary(self, x: str, weight: str, n: int, k: int) -> str:
        inputs = self._codes_scales(weight)
        size = self.group_size
        return self.b.op("TernaryMatMul", x, *inputs, domain=DOMAIN, group_size=size, profile=PROFILE)

    def mixer(self, projected: str, layer: Layer, state: StateNames) -> str:
        outputs = (self.b.name(SCAN_OUTPUTS[0]), state.present_conv, state.present_ssm)
        inputs = self._scan_inputs(projected, layer, state)
        return self.b.ops("SelectiveScan", *inputs, outputs=outputs, domain=DOMAIN, profile=PROFILE)[0]

    def head(self, x: str, weight: str, kind: str) -> None:
        operator = head_operator(kind)
        inputs = self._codes_scales(weight) if kind == "q8" else (self._dense(weight, kind),)
        self.b.op(operator, x, *inputs, out="logits", domain=DOMAIN, profile=PROFILE)


def head_operator(embedding_type: str) -> str:
    """The operator of the custom form's head."""
    return "Q8MatMul" if embedding_type == "q8" else "DenseMatMul"


class Ort(Portable):
    """onnxruntime's contributed operators, version 1 of com.microsoft; ai.onnx 23 for RMSNormalization."""

    opset = 23

    def norm(self, x: str, weight: str) -> str:
        return self.b.op("RMSNormalization", x, weight, axis=-1, epsilon=self.config.rms_eps)

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        outputs = (self.b.name("normed"), "", "", self.b.name("hidden"))
        kind, epsilon = "SkipSimplifiedLayerNormalization", self.config.rms_eps
        self.b.ops(kind, x, y, weight, outputs=outputs, domain=MICROSOFT, epsilon=epsilon)
        for name in (outputs[0], outputs[3]):
            self.b.annotate(name, ("batch", "time", self.config.d_model))
        return outputs[3], outputs[0]

    def ternary(self, x: str, weight: str, n: int, k: int, bias: str = "") -> str:
        block = min(self.group_size, ORT_BLOCK)
        optional = [_zero_points(self.b, n, k // block)] + (["", bias] if bias else [])
        return self._nbits(x, weight, n, k, bits=2, block=block, optional=optional)

    def in_proj(self, x: str, layer: Layer, n: int, k: int) -> str:
        """With dt_bias added: the product has a bias, and a token costs by the node. onnxruntime pads it once, at load."""
        before_dt = n - self.config.n_heads
        return self.ternary(x, layer.in_proj, n, k, self.b.op("Pad", layer.dt_bias, self.b.ints(before_dt, 0)))

    def mixer(self, projected: str, layer: Layer, state: StateNames) -> str:
        b, c = self.b, self.config
        heads, bc = c.n_heads, c.n_groups * c.d_state
        z, xbc, dt = b.ops("Split", projected, b.ints(c.d_inner, c.conv_dim, heads), outputs=3, axis=-1)
        xbc = b.op("Transpose", xbc, perm=[0, 2, 1])
        inputs, outputs = (
            (xbc, layer.conv_weight, layer.conv_bias, state.past_conv),
            (b.name("conv"), state.present_conv),
        )
        b.ops("CausalConvWithState", *inputs, outputs=outputs, domain=MICROSOFT, activation="silu")
        b.annotate(outputs[0], ("batch", c.conv_dim, "time"))
        xbc = b.op("Transpose", outputs[0], perm=[0, 2, 1])
        x, bb, cc = b.ops("Split", xbc, b.ints(c.d_inner, bc, bc), outputs=3, axis=-1)
        dt = b.op("Softplus", dt)
        by_head = b.op("Reshape", x, b.ints(0, 0, heads, c.headdim))
        dx = b.op("Reshape", b.op("Mul", by_head, b.op("Unsqueeze", dt, b.ints(3))), b.ints(0, 0, c.d_inner))
        # query C, key B (one a group), value dt * x, decay dt * A: the recurrence of Mamba-2
        inputs, outputs = (cc, bb, dx, state.past_ssm, b.op("Mul", dt, layer.a)), (b.name("scan"), state.present_ssm)
        attributes = {"q_num_heads": c.n_groups, "kv_num_heads": heads, "scale": 1.0, "update_rule": "gated"}
        b.ops("LinearAttention", *inputs, outputs=outputs, domain=MICROSOFT, **attributes)
        b.annotate(outputs[0], ("batch", "time", c.d_inner))
        d = b.op("Expand", b.op("Unsqueeze", layer.d, b.ints(1)), b.ints(heads, c.headdim))
        y = b.op("Add", outputs[0], b.op("Mul", x, b.op("Reshape", d, b.ints(c.d_inner))))  # D is spread out at load
        gated = b.op("Mul", y, m.silu(b, z))
        if c.n_groups == 1:
            return self.norm(gated, layer.gate_norm)
        parts = b.op("Reshape", gated, b.ints(0, 0, c.n_groups, -1))
        normed = self.norm(parts, b.const(np.ones(c.d_inner // c.n_groups, np.float32)))
        return b.op("Mul", b.op("Reshape", normed, b.ints(0, 0, c.d_inner)), layer.gate_norm)

    def embed(self, ids: str, weight: str, kind: str) -> str:
        if kind != "q8":
            return super().embed(ids, weight, kind)
        b = self.b  # standard operators: GatherBlockQuantized wants the codes in another rank than MatMulNBits
        codes = b.op("Cast", b.op("Gather", f"{weight}.codes", ids, axis=0), to=TensorProto.FLOAT)
        scales = b.op("Unsqueeze", b.op("Gather", f"{weight}.scales", ids, axis=0), b.ints(-1))
        return b.op("Reshape", b.op("Mul", b.op("Sub", codes, b.scalar(128.0)), scales), b.ints(0, 0, -1))

    def head(self, x: str, weight: str, kind: str) -> None:
        n, k = self.config.vocab_size, self.config.d_model
        if kind == "q8":
            self._nbits(x, weight, n, k, bits=8, block=ORT_HEAD_BLOCK, optional=[], out="logits")
        else:
            super().head(x, weight, kind)

    def _nbits(
        self, x: str, weight: str, n: int, k: int, bits: int, block: int, optional: list[str], out: str = ""
    ) -> str:
        # accuracy_level 4 (int8 activations) is said aloud: without it the 2-bit product is some 300 times slower
        inputs = (x, f"{weight}.codes", f"{weight}.scales", *optional)
        sizes = {"N": n, "K": k, "bits": bits, "block_size": block, "accuracy_level": 4}
        dims = ("batch", "time", n)
        return self.b.op("MatMulNBits", *inputs, domain=MICROSOFT, out=out, dims=None if out else dims, **sizes)


def _zero_points(b: Builder, n: int, blocks: int) -> str:
    """Code 1 means zero: four 2-bit ones a byte, one for each block."""
    return b.const(np.full((n, -(-blocks // 4)), 0x55, np.uint8))
