"""The pieces of the graph that differ between the forms: how a norm, a product, the embedding and the head are written.

ort       onnxruntime's own operators (com.microsoft): 2-bit weights times int8 activations
custom    our operators, which are functions of standard ones (functions.py)
portable  the same functions written out: standard operators only
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tmexport.model import Model, ModelTensor
from tmexport.onnx import mathematics as m
from tmexport.onnx.builder import Builder
from tmexport.onnx.names import DOMAIN, MICROSOFT
from tmexport.onnx.weights import ORT_BLOCK, ORT_HEAD_BLOCK

PROFILE = "exact"


class Portable:
    """Standard operators only, ai.onnx 15 and later."""

    opset = 15

    def __init__(self, b: Builder, model: Model, group_size: int) -> None:
        self.b, self.model, self.group_size = b, model, group_size

    @property
    def epsilon(self) -> str:
        """The norms' epsilon as a tensor: an attribute would reach a Python kernel as six decimal digits."""
        return self.b.scalar(self.model.rms_eps)

    def norm(self, x: str, weight: str) -> str:
        return m.rms_norm(self.b, x, weight, self.epsilon, self.model.d_model)

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        """x + y, and its norm."""
        total = self.b.op("Add", x, y, dims=("batch", "time", self.model.d_model))
        return total, self.norm(total, weight)

    def product(self, x: str, weight: str, bias: str = "") -> str:
        """x [B, T, k] times a branch's matrix [n, k], by the name of its initialiser; bias [n] is added by the ort form alone."""
        assert not bias, "only onnxruntime's product takes a bias"
        return self._product(x, self.model.tensors[weight])

    def _product(self, x: str, weight: ModelTensor) -> str:
        if not weight.low_bit:
            return m.matmul(self.b, x, weight.hf)
        dense = m.unpack_ternary(self.b, *self._codes_scales(weight.hf), self.b.ints(0, -1, self.group_size))
        return m.matmul(self.b, x, dense)

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


class Custom(Portable):
    """One node of our domain for each function. Scales are cast to fp32 outside: Python kernels cannot take fp16."""

    def norm(self, x: str, weight: str) -> str:
        return self.b.op("RMSNorm", x, weight, self.epsilon, domain=DOMAIN, profile=PROFILE)

    def _product(self, x: str, weight: ModelTensor) -> str:
        if not weight.low_bit:
            return super()._product(x, weight)
        inputs = self._codes_scales(weight.hf)
        size = self.group_size
        return self.b.op("TernaryMatMul", x, *inputs, domain=DOMAIN, group_size=size, profile=PROFILE)

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
        return self.b.op("RMSNormalization", x, weight, axis=-1, epsilon=self.model.rms_eps)

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        outputs = (self.b.name("normed"), "", "", self.b.name("hidden"))
        kind, epsilon = "SkipSimplifiedLayerNormalization", self.model.rms_eps
        self.b.ops(kind, x, y, weight, outputs=outputs, domain=MICROSOFT, epsilon=epsilon)
        for name in (outputs[0], outputs[3]):
            self.b.annotate(name, ("batch", "time", self.model.d_model))
        return outputs[3], outputs[0]

    def product(self, x: str, weight: str, bias: str = "") -> str:
        tensor = self.model.tensors[weight]
        if not tensor.low_bit:
            return self._product(x, tensor) if not bias else self.b.op("Add", self._product(x, tensor), bias)
        n, k = tensor.shape
        block = min(self.group_size, ORT_BLOCK)
        optional = [_zero_points(self.b, n, k // block)] + (["", bias] if bias else [])
        return self._nbits(x, weight, n, k, bits=2, block=block, optional=optional)

    def embed(self, ids: str, weight: str, kind: str) -> str:
        if kind != "q8":
            return super().embed(ids, weight, kind)
        b = self.b  # standard operators: GatherBlockQuantized wants the codes in another rank than MatMulNBits
        codes = b.op("Cast", b.op("Gather", f"{weight}.codes", ids, axis=0), to=TensorProto.FLOAT)
        scales = b.op("Unsqueeze", b.op("Gather", f"{weight}.scales", ids, axis=0), b.ints(-1))
        return b.op("Reshape", b.op("Mul", b.op("Sub", codes, b.scalar(128.0)), scales), b.ints(0, 0, -1))

    def head(self, x: str, weight: str, kind: str) -> None:
        n, k = self.model.vocab_size, self.model.d_model
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
