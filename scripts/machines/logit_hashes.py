"""SHA-256 of a model's logits with every instruction set of this CPU: the same everywhere, or something is wrong.

Example: python scripts/machines/logit_hashes.py demo_out/student.gguf

For each profile, the logits after each of 256 prompt tokens (fixed ids, whole chunks) and of 64 more, chosen greedily and
decoded one at a time. RUNTIME_REF_ISA limits the run to one instruction set. The last line on stdout is one JSON object:
agree, hashes {profile: {instruction set: sha256}}, what ran and where. Exit code 1 if two sets disagree.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path

import click
import llvmlite.binding as llvm
import numpy as np

from runtime_ref.arithmetic import PRESETS
from runtime_ref.gguf_source import gguf_source
from runtime_ref.kernels.isa import available
from runtime_ref.model import Model
from runtime_ref.weights import Source
from tmexport.cli.app import run_command

PROMPT, DECODED = 256, 64


def logits_digest(model: Model, prompt_tokens: int = PROMPT, decoded: int = DECODED) -> str:
    """SHA-256 (hex) of fp32 [prompt_tokens + decoded, vocab], little-endian, row after row."""
    digest, state = hashlib.sha256(), model.new_state()
    prompt = [(7919 * i + 11) % model.config.vocab_size for i in range(prompt_tokens)]
    logits = np.zeros((1, 1), np.float32)
    for logits in model.score(state, prompt):
        digest.update(logits.tobytes())
    row = logits[-1]
    for _ in range(decoded):
        row = model.decode(state, int(row.argmax()))
        digest.update(row.tobytes())
    return digest.hexdigest()


def measure(source: Source, profile: str, isa: str) -> str:
    """The digest with one instruction set, and a line on stderr that says how long it took."""
    os.environ["RUNTIME_REF_ISA"] = isa
    start = time.perf_counter()
    model = Model(source, profile)
    model.compile()
    ready = time.perf_counter()
    digest = logits_digest(model)
    model.close()
    seconds = f"{ready - start:.1f} s to build and compile, {time.perf_counter() - ready:.1f} s to run"
    click.echo(f"{isa:12} {profile:7} {digest[:16]}  {seconds}", err=True)
    return digest


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def logit_hashes(model_path: Path) -> None:
    """Compare the logits of MODEL.gguf between all instruction sets of this CPU.

    \b
    Example:
      python scripts/machines/logit_hashes.py demo_out/student.gguf
    """
    wanted = os.environ.get("RUNTIME_REF_ISA", "").strip().lower()
    sets = [wanted] if wanted else available()
    source = gguf_source(model_path)
    hashes = {profile: {isa: measure(source, profile, isa) for isa in sets} for profile in PRESETS}
    agree = all(len(set(found.values())) == 1 for found in hashes.values())
    result = {
        "agree": agree,
        "hashes": hashes,
        "model": model_path.name,
        "model_sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        "tokens": [PROMPT, DECODED],
        "machine": platform.machine(),
        "cpu": llvm.get_host_cpu_name(),
    }
    click.echo(json.dumps(result))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    run_command(logit_hashes, "scripts/machines/logit_hashes.py")
