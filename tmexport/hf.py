"""`import tmexport.hf`, and transformers loads our checkpoints: `AutoModelForCausalLM.from_pretrained(folder)`.

Codes and scales are multiplied out once, exactly, while loading; what transformers then has is a plain dense model (also on
its fused Mamba-2 path, which reads weights beside their modules), and what it saves is one. The folder itself is what to
upload: its layout is the one the Hub expects.

Needs transformers 5.24 and torch.
"""

from __future__ import annotations

from typing import Any

from tmexport.errors import CheckpointError, UsageError
from tmexport.model import Model, parse_config
from tmexport.quantization import Stored, read_quantization
from tmexport.types import KINDS

LOWEST = (5, 24)  # releases before it take these classes, and load other weights in silence or cannot save
NEEDED = f"tmexport.hf needs torch and transformers {LOWEST[0]}.{LOWEST[1]} or newer"
HOW = f"run: pip install torch 'transformers>={LOWEST[0]}.{LOWEST[1]}'"

try:
    import torch
    import transformers
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise UsageError(f"{NEEDED} ({error}); {HOW}") from None
if tuple(map(int, transformers.__version__.split(".")[:2])) < LOWEST:
    raise UsageError(f"{NEEDED}; this is {transformers.__version__}; {HOW}")

METHODS = ("ternary", "tmexport")  # quant_method of versions 1 and 2 of our quantization_config


class Config(QuantizationConfigMixin):
    """Our quantization_config as transformers keeps it. dequantize: the model is a dense one after loading."""

    def __init__(self, quant_method: str, **fields: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment] # a member of an enum there, which ours is not in
        self.dequantize, self.fields = True, fields

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"quant_method": self.quant_method, **self.fields}


class Quantizer(HfQuantizer):
    """Loads codes and scales as the dense weights that they stand for."""

    serialized_names = {"weight": ["weight.codes", "weight.scales"]}  # noqa: RUF012 - transformers' own form

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        spec = parse_config(model.config.to_dict())
        stored = read_quantization({"quantization_config": self.quantization_config.to_dict()}, spec, "config.json")
        self.forms = _by_file(spec, stored)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Multiply}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _by_file(spec: Model, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The form of each coded weight by its name in the files."""
    return {t.file: stored[t.role] for t in spec.tensors.values() if t.role in stored}


class Multiply(ConversionOps):
    """Codes uint8 [n, k / codes a byte] and scales fp16 [n, k / group size] -> the weight fp32 [n, k], exactly."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        name = full_layer_name or ""
        form = self.hf_quantizer.forms.get(name)
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if form is None or set(parts) != {"weight.codes", "weight.scales"}:
            raise CheckpointError(f"{name}: has {', '.join(parts)}; config.json says {form or 'dense'}")
        kind = KINDS[form.kind]
        codes = kind.unpack(parts["weight.codes"].cpu().numpy(), name)
        dense = kind.tensor(codes, parts["weight.scales"].cpu().numpy(), form.group_size).check(name).dense()
        return {"weight": torch.from_numpy(dense.astype("float32"))}


for _method in METHODS:
    register_quantization_config(_method)(Config)
    register_quantizer(_method)(Quantizer)
