"""Small models of the families with attention, saved by transformers' own classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {"vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_MAMBA = {"mamba_d_state": 64, "mamba_d_head": 64, "mamba_chunk_size": 64}

# name -> (class of the configuration, its arguments): several widths, groups, heads and multipliers
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {
        "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 512, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
    }),
    "llama-tied-one-kv-head": (transformers.LlamaConfig, {
        "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 320, "tie_word_embeddings": True, "attention_bias": True,
    }),
    "granite": (transformers.GraniteMoeHybridConfig, {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "shared_intermediate_size": 512, "num_local_experts": 0, "mamba_n_heads": 8, "tie_word_embeddings": True,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.246,
        "attention_multiplier": 0.0625, **_MAMBA,
    }),
    "granite-rope-8-groups": (transformers.GraniteMoeHybridConfig, {
        "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "shared_intermediate_size": 320, "num_local_experts": 0, "mamba_n_heads": 8, "mamba_n_groups": 8,
        "layer_types": ["attention", "mamba", "mamba"], "position_embedding_type": "rope",
        "attention_bias": True, "attention_multiplier": 0.125, "rms_norm_eps": 1e-5, **_MAMBA,
    }),
    "falcon": (transformers.FalconH1Config, {
        "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 320, "mamba_d_ssm": 384, "mamba_n_heads": 6, "rope_theta": 1e11,
        "attention_in_multiplier": 0.75, "attention_out_multiplier": 0.9375, "key_multiplier": 0.39, "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.23, "embedding_multiplier": 5.65, "lm_head_multiplier": 0.39, "mlp_multipliers": [0.88, 0.55],
        "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.32], **_MAMBA,
    }),
    "falcon-norm-2-groups": (transformers.FalconH1Config, {
        "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
        "intermediate_size": 256, "mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_rms_norm": True,
        "mamba_norm_before_gate": False, "tie_word_embeddings": True, "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5, **_MAMBA,
    }),
}  # fmt: skip


def save(name: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Save a random model of FAMILIES; returns transformers' own. Weights are large enough for logits that differ."""
    config_class, arguments = FAMILIES[name]
    config = config_class(**_SMALL | arguments)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "conv1d" not in key:
                scale = (0.05 if config.tie_word_embeddings else 0.5) if "embed" in key else parameter.shape[1] ** -0.5
                parameter.normal_(std=scale)
            elif key.endswith("A_log"):
                parameter.uniform_(1, 16).log_()
            elif key.endswith("dt_bias"):
                parameter.uniform_(-6, -2)
            elif key.endswith("norm.weight") or key.endswith(".D"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model
