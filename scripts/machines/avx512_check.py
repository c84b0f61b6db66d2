"""The logits of the AVX512-VNNI and AVX-VNNI kernels, computed by an emulated CPU: those of this CPU, or something is wrong.

Example: python scripts/machines/avx512_check.py demo_out/student.gguf

Numba compiles the forward pass for a core, as it would on that core, and Bochs's CPU executes it (emulated_cpu.py) on 40
prompt tokens, all at once, and on 8 decoded ones. Needs `cc` and bochscpu-python on Linux on x86-64. The last
line on stdout is one JSON object: agree, hashes {profile: {core or "this CPU": sha256}}, vnni {profile: {core: how many VNNI
instructions of each kind and width the compiled code holds}}, and what ran. Exit code 1 if two hashes differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import runtime_ref.model
from runtime_ref.arithmetic import PRESETS
from runtime_ref.gguf_source import gguf_source
from runtime_ref.kernels import program
from runtime_ref.kernels.isa import SETS, select
from runtime_ref.kernels.kinds import pack
from runtime_ref.model import Model
from scripts.machines.emulated_cpu import EmulatedCpu, EmulatedFunction, EmulationError, require
from scripts.machines.logit_hashes import logits_digest
from tmexport.cli.app import run_command

# LLVM's name of a core, and the instruction set; the emulated CPU has no AMX. The runtime chooses the tables on znver4.
CORES = {
    "icelake-server": ("icelake-server", "avx512vnni"),
    "sapphirerapids": ("sapphirerapids", "avx512vnni"),
    "icelake-server-tables": ("icelake-server", "avx512tables"),
    "znver4": ("znver4", "avx512tables"),
    "alderlake": ("alderlake", "avxvnni"),
}
PROFILES = tuple(PRESETS)
PROMPT, DECODED = 40, 8
VNNI = re.compile(r"^\s*(?:\{vex\}\s+)?(vpdp\w+)\s.*%([xyz]mm)\d+$", re.MULTILINE)


def emulated(path: Path, profile: str) -> dict[str, Any]:
    """sha256 of the logits by the code that Numba compiles in this process, and the number of its VNNI instructions.

    The weights are packed by numpy: the runtime's compiled repacking would be code for the other core too.
    """
    source = gguf_source(path)
    matrix = source.matrix
    source = replace(source, packed=lambda name: pack(matrix(name)))
    runtime_ref.model.run = EmulatedFunction(runtime_ref.model.run, EmulatedCpu())
    phases, address = set[Any](), program._address

    def noted(entry: Any) -> int:
        phases.add(entry)
        return address(entry)

    program._address = noted  # `run` calls the phases by their addresses: the emulated CPU finds them there
    model = Model(source, profile, threads=1)
    model.compile()
    digest = logits_digest(model, PROMPT, DECODED)
    code = [compiled.library.get_asm_str() for phase in phases for compiled in phase.code.overloads.values()]
    found = [pair for one in code for pair in VNNI.findall(one)]
    return {"sha256": digest, "vnni": Counter(f"{name} {width}" for name, width in found)}


def on_core(path: Path, profile: str, core: str) -> dict[str, Any]:
    """`emulated`, in a process whose Numba compiles for that core.

    Raises:
        EmulationError: it failed; its last line says why.
    """
    (cpu, name), start = CORES[core], time.perf_counter()
    features = ",".join(f"+{feature}" for feature in ("f16c", *SETS[name][1]))
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "NUMBA_CPU_NAME": cpu,
            "NUMBA_CPU_FEATURES": features,
            "NUMBA_CACHE_DIR": cache,
            "RUNTIME_REF_ISA": name,
        }
        command = [sys.executable, __file__, "--emulate", profile, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [*done.stderr.strip().splitlines(), f"ended with {done.returncode}"]
        wrong = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
        raise EmulationError(f"{core}, {profile}: {wrong}")
    result = json.loads(done.stdout.splitlines()[-1])
    seconds = f"{time.perf_counter() - start:.0f} s to compile and to emulate"
    click.echo(f"{core:21} {name:12} {profile:7} {result['sha256'][:16]}  {seconds}", err=True)
    return result


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--core", "cores", type=click.Choice(list(CORES)), multiple=True, help="Only this core; may be repeated.")
@click.option("--emulate", type=click.Choice(PROFILES), hidden=True, help="Run in this process, for NUMBA_CPU_NAME.")
def avx512_check(model_path: Path, cores: tuple[str, ...], emulate: str | None) -> None:
    """Compare the logits of MODEL.gguf between this CPU and emulated ones with AVX512-VNNI and AVX-VNNI.

    \b
    Example:
      python scripts/machines/avx512_check.py demo_out/student.gguf
    """
    if emulate:
        click.echo(json.dumps(emulated(model_path, emulate)))
        sys.stdout.flush()
        os._exit(0)  # bochscpu prints hundreds of lines when Python ends in order
    require()
    hashes: dict[str, dict[str, str]] = {}
    vnni: dict[str, dict[str, dict[str, int]]] = {}
    for profile in PROFILES:
        model = Model.load(model_path, profile)
        mine = logits_digest(model, PROMPT, DECODED)
        model.close()
        click.echo(f"{'this CPU':21} {type(select()).__name__.lower():12} {profile:7} {mine[:16]}", err=True)
        results = {core: on_core(model_path, profile, core) for core in cores or CORES}
        hashes[profile] = {"this CPU": mine} | {core: result["sha256"] for core, result in results.items()}
        vnni[profile] = {core: result["vnni"] for core, result in results.items()}
    agree = all(len(set(found.values())) == 1 for found in hashes.values())
    digest = hashlib.sha256(model_path.read_bytes()).hexdigest()
    result = {"agree": agree, "hashes": hashes, "vnni": vnni, "model": model_path.name, "model_sha256": digest}
    click.echo(json.dumps(result | {"tokens": [PROMPT, DECODED]}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    run_command(avx512_check, "scripts/machines/avx512_check.py")
