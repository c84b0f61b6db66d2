"""Our training step against transformers' Mamba2 training step: tokens per second at the demo's dimensions.

    python scripts/bench/training_step.py --rounds 7 --threads 2

Both train the same model (d_model 256, 4 layers, 4096 tokens, tied head) on the same batch with AdamW in fp32: forward,
cross-entropy, backward, clipping, optimiser. Rounds alternate between the two, so a busy machine slows both; medians
are compared, of the time on the clock and of the processor's time (of all threads). The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

import click
import torch
import torch.nn.functional as F
from torch import nn

from qat.memory import keep_freed_memory
from qat.model import LanguageModel
from qat.plan import config_of
from qat.recipe import load_recipe
from qat.train.step import Step, make_optimizer
from tmexport.cli.app import run_command


@click.command()
@click.option("--rounds", default=7, show_default=True, help="timed steps of each")
@click.option("--threads", default=2, show_default=True, help="CPU threads")
def main(rounds: int, threads: int) -> None:
    """Time one training step of ours and of transformers', in turn."""
    import transformers

    keep_freed_memory()  # for both
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    recipe = load_recipe("demo-cpu", "teacher", {})
    config = config_of(recipe)
    ours, peer = LanguageModel(config), transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config.to_hf()))
    peer.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.head_weight})
    ids = torch.randint(0, config.vocab_size, (recipe.batch_size, recipe.seq_len + 1))
    step = Step(ours, None, recipe)

    def loss_of_peer() -> torch.Tensor:
        logits = peer(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    runs = {"ours": (ours, lambda: step(ids)[0]), "transformers": (peer, loss_of_peer)}
    optimizers = {name: make_optimizer(model, recipe) for name, (model, _) in runs.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, (model, loss_of) in runs.items():
            began, busy = time.perf_counter(), time.process_time()
            losses[name] = _step(model, loss_of, optimizers[name])
            if turn:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - began, time.process_time() - busy))
    clock, processor = ({name: median(pair[i] for pair in pairs) for name, pairs in seconds.items()} for i in (0, 1))
    result = {
        "tokens_per_second": {name: round(recipe.tokens_per_step / value) for name, value in clock.items()},
        "ratio": round(clock["transformers"] / clock["ours"], 2),
        "processor_seconds_a_step": {name: round(value, 3) for name, value in processor.items()},
        "processor_ratio": round(processor["transformers"] / processor["ours"], 2),
        "last_loss": losses,
        "threads": threads,
        "rounds": rounds,
    }
    click.echo(json.dumps(result))


def _step(model: nn.Module, loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    run_command(main, "scripts/bench/training_step.py")
