"""What the tests of qat share: a tiny model's dimensions, recipes that train it, and a few sentences."""

import json

from qat.recipe import Recipe
from tests.models import random_tensors
from tmexport.checkpoint import write_checkpoint
from tmexport.model import mamba2_model

SENTENCES = [
    "The union of the States is the work of the people.",
    "Our commerce with all nations has grown, and our debts are paid.",
    "Fellow citizens, the state of the Union is strong — stronger than last year.",
]


def tiny_config(**changes):
    values = {"d_model": 64, "n_layer": 2, "vocab_size": 300, "d_state": 16, "headdim": 32, "expand": 2}
    return mamba2_model(**{**values, **changes})


def small_teacher(folder, tokenizer_path, repeats):
    """A random teacher of the studies, and a text for it."""
    text = folder / "text.txt"
    text.write_text("The state of the Union is strong, and our debts are paid. " * repeats)
    config = tiny_config(d_model=128, vocab_size=300, eos_token_id=0)
    write_checkpoint(folder / "teacher", config, random_tensors(config, 5), tokenizer_path)
    return folder / "teacher", text


TINY = {"d_model": 64, "n_layer": 1, "d_state": 16, "headdim": 32, "vocab_size": 300}
TINY |= {"steps": 30, "seq_len": 32, "batch_size": 4, "lr": 1e-2, "threads": 1, "log_every": 5, "save_every": 10}
STUDENT = Recipe(**{**TINY, "group_size": 64, "lr": 3e-3, "eval_every": 10, "weight_decay": 0.0})


def curve(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
