"""One distillation step of mamba2-1.3b at full width with 2 of its 48 layers, on this CPU, against the plan's numbers.

    python scripts/bench/step_at_full_width.py --recipe mamba2-1.3b-h100 --layers 2 --seq-len 256

Weights are random. What autograd keeps is counted on the real step, in fp32, and compared with what `--plan` counts on the
meta device; then the plan for all layers is printed. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, replace

import click
import torch
from torch import Tensor

from qat.model import LanguageModel
from qat.model.mamba2 import default_chunk
from qat.plan import config_of, describe, layer_activations, make_plan
from qat.quantizer import make_low_bit
from qat.recipe import load_recipe
from qat.train.step import Step, make_optimizer
from tmexport.cli.app import run_command


@click.command()
@click.option("--recipe", "name", default="mamba2-1.3b-h100", show_default=True, help="recipe with the dimensions")
@click.option("--layers", default=2, show_default=True, help="layers that are really there")
@click.option("--seq-len", default=256, show_default=True, help="tokens of the one sequence")
@click.option("--threads", default=2, show_default=True, help="CPU threads")
def main(name: str, layers: int, seq_len: int, threads: int) -> None:
    """Run the step, count, compare."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    recipe = load_recipe(name, "student", {})
    full = config_of(recipe)
    small = replace(recipe, dtype="float32", batch_size=1, accumulate=1, seq_len=seq_len, checkpoint_activations=False)
    config = replace(full, blocks=full.blocks[:layers])
    teacher = LanguageModel(config).requires_grad_(False)
    student = LanguageModel(config)
    student.load_state_dict(teacher.state_dict())
    make_low_bit(student, "ternary", recipe.group_size)
    optimizer = make_optimizer(student, small)
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = tensor
        return tensor

    ids = torch.randint(0, config.vocab_size, (1, seq_len + 1))
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, ce, kl = Step(student, teacher, small)(ids)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - began

    with torch.device("meta"):
        shapes = make_low_bit(LanguageModel(config), "ternary", recipe.group_size)
    _, planned = layer_activations(shapes.backbone.layers[0], 1, seq_len, config.d_model, False)
    head = 4 * config.vocab_size * config.d_model  # the gradient of the head, which the loss keeps
    plan = make_plan(recipe, full, "h100", full)
    click.echo(describe(plan), err=True)
    result = {
        "seconds": round(seconds, 1),
        "loss": loss.item(),
        "cross_entropy": ce.item(),
        "kl": kl.item(),
        "kept_bytes_counted": counted,
        "kept_bytes_planned": layers * planned + head,
        "scan_chunk_here": default_chunk(torch.device("cpu")),
        "scan_chunk_in_the_plan": min(seq_len, default_chunk(torch.device("cuda"))),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan_for_all_layers": asdict(plan),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "scripts/bench/step_at_full_width.py")
