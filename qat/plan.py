"""What a recipe will cost, without loading a weight: parameters, memory, tokens, FLOPs, hours.

The activations are not estimated from a formula: one layer runs on torch's meta device (shapes without data) and what
autograd keeps for its backward pass is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from qat.model import LanguageModel, ResidualBlock
from qat.quantizer import make_low_bit
from qat.recipe import Recipe
from qat.train.step import freeze
from tmexport.errors import UsageError
from tmexport.model import Model, mamba2_model

UTILISATION = 0.06  # of the bf16 peak: 4.8 % aligning, 7.2 % distilling, SmolLM2-135M on one H200, not compiled


@dataclass(frozen=True)
class Accelerator:
    """Dense bf16 peak in FLOP/s and memory in bytes, from the vendor's data sheet."""

    flops: float
    memory: float


ACCELERATORS = {
    "h100": Accelerator(989e12, 80e9),
    "h200": Accelerator(989e12, 141e9),
    "a100": Accelerator(312e12, 80e9),
    "rtx4090": Accelerator(165e12, 24e9),
}


@dataclass(frozen=True)
class Plan:
    """Parameters, tokens and FLOPs are counts; memory is in bytes on each accelerator."""

    parameters: int
    ternary_parameters: int
    steps: int
    tokens: int
    flops: float
    memory_weights: int
    memory_gradients: int
    memory_optimizer: int
    memory_teacher: int
    memory_activations: int
    memory_loss: int
    memory_total: int
    accelerator: str
    memory_available: int
    fits: bool
    hours: float


def config_of(recipe: Recipe, tied: bool = True) -> Model:
    """The dimensions a recipe states."""
    return mamba2_model(
        d_model=recipe.d_model,
        n_layer=recipe.n_layer,
        vocab_size=recipe.vocab_size,
        d_state=recipe.d_state,
        expand=recipe.expand,
        headdim=recipe.headdim,
        n_groups=recipe.n_groups,
        tie_embeddings=tied,
    )


def make_plan(recipe: Recipe, config: Model, accelerator: str, teacher: Model | None) -> Plan:
    """The cost of `recipe` on one accelerator of a kind in ACCELERATORS.

    Args:
        config: of what is trained.
        teacher: what it imitates, which may be of the same dimensions; None: it is trained from nothing.

    Raises:
        UsageError: the accelerator is not known, the group size does not fit the model, or the recipe trains nothing of it.
    """
    if accelerator not in ACCELERATORS:
        raise UsageError(f"accelerator {accelerator!r} is not known; expected one of {', '.join(ACCELERATORS)}")
    machine = ACCELERATORS[accelerator]
    with torch.device("meta"):
        model, imitated = LanguageModel(config), LanguageModel(teacher) if teacher is not None else None
    if teacher is not None:
        make_low_bit(
            model, recipe.weights, recipe.group_size, False, recipe.ternary_embedding, recipe.projections, recipe.rest
        )
    freeze(model, recipe)
    parameters, trained = _count(model.parameters()), _count(p for p in model.parameters() if p.requires_grad)
    tokens = recipe.steps * recipe.tokens_per_step

    aligned = recipe.objective != "predict"  # layer by layer: what does not learn is not computed, nor are the logits
    every = zip(config.blocks, model.backbone.blocks, strict=True)
    layers = [(kind, block) for kind, block in every if not aligned or _learns(block)]
    blocks = [block for _, block in layers]
    sequences = max(1, recipe.batch_size // recipe.accumulate)
    low = recipe.dtype == "bfloat16"
    measured = {
        kind: layer_activations(layer, sequences, recipe.seq_len, config.d_model, low)
        for kind, layer in dict(layers).items()
    }
    entering, largest = (max(pair[i] for pair in measured.values()) for i in (0, 1))
    if recipe.checkpoint_activations:
        activations = len(blocks) * entering + 2 * largest  # one block's tensors, and as much again of their gradients
    else:
        activations = sum(measured[kind][1] for kind, _ in layers) + largest
    head = model.head_weight
    memory = (
        4 * parameters,  # weights
        4 * trained,  # gradients
        8 * trained,  # optimizer
        (2 if low else 4) * _count(imitated.parameters()) if imitated is not None else 0,  # teacher
        activations,
        # loss: gradient of the head, logits of one chunk, hidden states
        2 * entering + (0 if aligned else 4 * head.numel() * head.requires_grad + 6 * 4 * 2**21),
    )
    total = sum(memory)
    flops = float(_forward(blocks, recipe.seq_len) + (0 if aligned else 2 * head.numel()))
    flops *= 3 + (1 if recipe.checkpoint_activations else 0)
    if imitated is not None and recipe.kd_weight > 0:
        flops += _forward(imitated.backbone.blocks, recipe.seq_len) + (
            0 if aligned else 2 * imitated.head_weight.numel()
        )
    flops *= tokens
    return Plan(
        parameters,
        sum(m.in_features * m.out_features for m in model.projections().values()),
        recipe.steps,
        tokens,
        flops,
        *memory,
        total,
        accelerator,
        int(machine.memory),
        total < 0.92 * machine.memory,  # the rest: the CUDA context, workspaces, fragmentation
        flops / (machine.flops * UTILISATION) / 3600,
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _learns(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def _forward(blocks: Iterable[ResidualBlock], seq_len: int) -> int:
    """FLOPs a token of a forward pass."""
    matrices = (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    inside = sum(branch.operations(seq_len) for block in blocks for branch in block.branches)
    return inside + 2 * sum(m.in_features * m.out_features for m in matrices)


def layer_activations(layer: nn.Module, sequences: int, seq_len: int, d_model: int, low: bool) -> tuple[int, int]:
    """(bytes of the layer's input, bytes of the other tensors that autograd keeps until the layer's backward pass).

    `layer` must be on the meta device; parameters are not counted.
    """
    assert isinstance(layer, ResidualBlock)
    own = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # holding it keeps the storage's identity from being used again
        return tensor

    hidden = torch.empty(sequences, seq_len, d_model, device="meta", requires_grad=True)
    # autocast does not act on the meta device: the 16-bit share is taken as half of what fp32 keeps.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return hidden.nbytes, total // 2 if low else total


def describe(plan: Plan) -> str:
    """The plan as lines for a person."""
    gigabytes = {key.removeprefix("memory_"): value / 1e9 for key, value in asdict(plan).items() if "memory_" in key}
    lines = [
        f"parameters   {plan.parameters:,} ({plan.ternary_parameters:,} ternary)",
        f"tokens       {plan.tokens:,} in {plan.steps:,} steps",
        f"compute      {plan.flops:.3g} FLOP",
        f"time         {plan.hours:.2f} hours on one {plan.accelerator} at {UTILISATION:.0%} of its bf16 peak, as measured with SmolLM2-135M",
    ]
    lines += [f"memory       {name:<12}{size:8.2f} GB" for name, size in gigabytes.items()]
    lines.append("it fits" if plan.fits else "it does not fit: raise --accumulate, or use --checkpoint-activations")
    return "\n".join(lines)
