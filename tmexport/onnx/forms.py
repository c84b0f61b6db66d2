"""The pieces of the graph that differ between the forms: how a norm, a product, the embedding and the head are written.

ort       onnxruntime's own operators (com.microsoft): 2, 4 and 8-bit weights times int8 activations
custom    our operators, which are functions of standard ones (functions.py)
portable  the same functions written out: standard operators only
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from tmexport.model import ModelTensor
from tmexport.onnx import mathematics as m
from tmexport.onnx.builder import Builder
from tmexport.onnx.names import DOMAIN, MICROSOFT, ModelInfo
from tmexport.onnx.weights import LAYOUTS, ORT_BLOCK, ORT_HEAD_BLOCK
from tmexport.quantization import Stored

PROFILE = "exact"


class Portable:
    """Standard operators only, ai.onnx 15 and later."""

    opset = 15

    def __init__(self, b: Builder, info: ModelInfo) -> None:
        self.b, self.info, self.model = b, info, info.config
        self._once: dict[str, tuple[str, ...]] = {}

    @property
    def epsilon(self) -> str:
        """The norms' epsilon as a tensor: an attribute would reach a Python kernel as six decimal digits."""
        return self.b.scalar(self.model.rms_eps)

    def once(self, what: str, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """What `make` writes, written when it is first asked for: it belongs to no layer."""
        if what not in self._once:
            scope, self.b.scope = self.b.scope, ""
            self._once[what] = make()
            self.b.scope = scope
        return self._once[what]

    def norm(self, x: str, weight: str) -> str:
        return m.rms_norm(self.b, x, weight, self.epsilon, self.model.d_model)

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        """x + y, and its norm."""
        total = self.b.op("Add", x, y, dims=("batch", "time", self.model.d_model))
        return total, self.norm(total, weight)

    def product(self, x: str, weight: str, bias: str = "") -> str:
        """x [B, T, k] times a branch's matrix [n, k], by the name of its initialiser; bias [n] is added."""
        y = self._product(x, self.model.tensors[weight])
        return self.b.op("Add", y, bias) if bias else y

    def _product(self, x: str, weight: ModelTensor) -> str:
        return m.matmul(self.b, x, self._matrix(weight))

    def _matrix(self, weight: ModelTensor) -> str:
        """A branch's matrix in fp32 [n, k]."""
        if not weight.low_bit:
            return weight.hf
        stored = self.stored(weight)
        if stored is None:
            return self._dense(weight.hf, self.info.dense_type)
        return _UNPACK[stored.kind](self.b, *self._codes_scales(weight.hf), stored.group_size)

    def stored(self, weight: ModelTensor) -> Stored | None:
        """How a matrix is stored; None: as values."""
        return self.info.weights.get(weight.role)

    def embed(self, ids: str, weight: str, kind: str) -> str:
        if kind == "q8":
            codes = self.b.op("Gather", f"{weight}.codes", ids, axis=0)
            scales = self.b.op("Gather", f"{weight}.scales", ids, axis=0)
            return m.unpack_q8(self.b, codes, self.b.op("Cast", scales, to=TensorProto.FLOAT), (0, 0))
        rows = self.b.op("Gather", weight, ids, axis=0)
        return rows if kind == "f32" else self.b.op("Cast", rows, to=TensorProto.FLOAT)

    def head(self, x: str, weight: str, kind: str, out: str) -> str:
        """The logits, called `out` ("": a new name)."""
        if kind == "q8":
            return m.matmul(self.b, x, m.unpack_q8(self.b, *self._codes_scales(weight), (0,)), out=out)
        return m.matmul(self.b, x, self._dense(weight, kind), out=out)

    def _codes_scales(self, weight: str) -> tuple[str, str]:
        return f"{weight}.codes", self.b.op("Cast", f"{weight}.scales", to=TensorProto.FLOAT)

    def _dense(self, weight: str, kind: str) -> str:
        return weight if kind == "f32" else self.b.op("Cast", weight, to=TensorProto.FLOAT)


def _two_bits(b: Builder, codes: str, scales: str, group_size: int) -> str:
    return m.unpack_ternary(b, codes, scales, b.ints(0, -1, group_size))


def _four_bits(b: Builder, codes: str, scales: str, group_size: int) -> str:
    return m.unpack_int4(b, codes, scales)


def _eight_bits(b: Builder, codes: str, scales: str, group_size: int) -> str:
    return m.unpack_q8(b, codes, scales, (0,))


_UNPACK = {"ternary": _two_bits, "binary": _two_bits, "int4": _four_bits, "int8": _eight_bits}
# the custom form's operator of each kind of codes; of a dense matrix it is DenseMatMul
OPERATORS = {"ternary": "TernaryMatMul", "binary": "TernaryMatMul", "int4": "Q4MatMul", "int8": "Q8MatMul"}


class Custom(Portable):
    """One node of our domain for each function. Scales are cast to fp32 outside: Python kernels cannot take fp16."""

    def norm(self, x: str, weight: str) -> str:
        return self.b.op("RMSNorm", x, weight, self.epsilon, domain=DOMAIN, profile=PROFILE)

    def _product(self, x: str, weight: ModelTensor) -> str:
        if not weight.low_bit:
            return super()._product(x, weight)
        stored = self.stored(weight)
        if stored is None:
            dense = self._dense(weight.hf, self.info.dense_type)
            return self.b.op("DenseMatMul", x, dense, domain=DOMAIN, profile=PROFILE)
        inputs, operator = self._codes_scales(weight.hf), OPERATORS[stored.kind]
        if operator != "TernaryMatMul":
            return self.b.op(operator, x, *inputs, domain=DOMAIN, profile=PROFILE)
        return self.b.op(operator, x, *inputs, domain=DOMAIN, group_size=stored.group_size, profile=PROFILE)

    def head(self, x: str, weight: str, kind: str, out: str) -> str:
        operator = head_operator(kind)
        inputs = self._codes_scales(weight) if kind == "q8" else (self._dense(weight, kind),)
        return self.b.op(operator, x, *inputs, out=out, domain=DOMAIN, profile=PROFILE)


def head_operator(embedding_type: str) -> str:
    """The operator of the custom form's head."""
    return "Q8MatMul" if embedding_type == "q8" else "DenseMatMul"


class Ort(Portable):
    """onnxruntime's contributed operators, version 1 of com.microsoft; ai.onnx 23 for RMSNormalization and Attention."""

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
        stored = self.stored(tensor) if tensor.low_bit else None
        if stored is None:
            return super().product(x, weight, bias)
        n, k = tensor.shape
        bits, block = LAYOUTS[stored.kind].bits, min(stored.group_size, ORT_BLOCK)
        zeros = (
            _zero_points(self.b, n, k // block) if bits == 2 else ""
        )  # of 4 and 8 bits: the operator's own, 8 and 128
        optional = [zeros, "", bias] if bias else [zeros] if zeros else []
        return self._nbits(x, weight, n, k, bits=bits, block=block, optional=optional)

    def embed(self, ids: str, weight: str, kind: str) -> str:
        if kind != "q8":
            return super().embed(ids, weight, kind)
        b = self.b  # standard operators: GatherBlockQuantized wants the codes in another rank than MatMulNBits
        codes = b.op("Cast", b.op("Gather", f"{weight}.codes", ids, axis=0), to=TensorProto.FLOAT)
        scales = b.op("Unsqueeze", b.op("Gather", f"{weight}.scales", ids, axis=0), b.ints(-1))
        return b.op("Reshape", b.op("Mul", b.op("Sub", codes, b.scalar(128.0)), scales), b.ints(0, 0, -1))

    def head(self, x: str, weight: str, kind: str, out: str) -> str:
        if kind != "q8":
            return super().head(x, weight, kind, out)
        n, k = self.model.vocab_size, self.model.d_model
        stored = self.stored(self.model.tensors[weight])
        block = stored.group_size if stored else ORT_HEAD_BLOCK
        return self._nbits(x, weight, n, k, bits=8, block=block, optional=[], out=out)

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
