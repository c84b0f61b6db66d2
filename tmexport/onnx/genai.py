"""What onnxruntime-genai wants beside a file: genai_config.json, and a tokenizer under the names that it looks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmexport.model import Model
from tmexport.model.branches.attention import Attention
from tmexport.onnx.names import TEMPLATES
from tmexport.tokenizer.gguf import ExportedTokenizer, stop_ids

CONFIG, TOKENIZER, SETTINGS = "genai_config.json", "tokenizer.json", "tokenizer_config.json"
_NO_LIMIT = 2**20  # positions, for a model without a limit: the program makes room for as many token ids


def genai_files(path: Path, model: Model, tokenizer: ExportedTokenizer | None) -> dict[Path, str]:
    """The texts of what lies beside the file `path` of a model with genai's names of inputs and outputs."""
    ends = stop_ids(tokenizer.metadata) if tokenizer else ()
    ends = ends or (() if model.eos_token_id is None else (model.eos_token_id,))
    files = {CONFIG: _json(genai_config(path.name, model, ends))}
    if tokenizer is not None:
        files |= {TOKENIZER: tokenizer.text, SETTINGS: _json(_settings(tokenizer.metadata))}
    return {path.with_name(name): text for name, text in files.items()}


def genai_config(name: str, model: Model, ends: Sequence[int]) -> dict[str, Any]:
    """genai_config.json (onnxruntime-genai, src/config.cpp) of the file `name`; ends: tokens that end a text.

    The type "decoder" is that of a model without peculiarities. The program finds the recurrent states by their names, which it derives
    from those of the keys, so that these are named for a model without attention too.
    """
    branches = [branch for block in model.blocks for branch in block.branches]
    attention = next((branch for branch in branches if isinstance(branch, Attention)), None)
    heads = (attention.n_heads, attention.n_kv_heads, attention.head_dim) if attention else (0, 0, 0)
    names: dict[str, dict[str, str]] = {"inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"}}
    for what, state in (("key", "k"), ("value", "v")):
        past, present = (text.format("%d") for text in TEMPLATES["genai"][state])
        names["inputs"][f"past_{what}_names"] = past
        names["outputs"][f"present_{what}_names"] = present
    context = model.context_length or _NO_LIMIT
    told = {"bos_token_id": model.bos_token_id, "eos_token_id": list(ends) or None}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": model.vocab_size,
            "context_length": context,
            **{key: value for key, value in told.items() if value is not None},
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": name,
                "hidden_size": model.d_model,
                "num_hidden_layers": len(model.blocks) // len(model.names.norms),
                "num_attention_heads": heads[0],
                "num_key_value_heads": heads[1],
                "head_size": heads[2],
                **names,
            },
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": False},
    }


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the class, without which genai refuses the folder, and the chat template."""
    chat = metadata.get("tokenizer.chat_template")
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": chat} if chat else {})


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
