"""A tile kernel by itself, as LLVM code and machine code for any core: what Numba would inline into the forward pass.

Example: python scripts/machines/tile_code.py

counts the instructions of the ternary product's loop on Arm (docs/edge.md). The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import click
import llvmlite.binding as llvm
from llvmlite import ir
from numba import typeof, types

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import isa
from runtime_ref.kernels.tiles import PLANES, ternary_tile
from tmexport.cli.app import run_command

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
ARM_LOOPS = (  # the instruction set, LLVM's core, preset, tokens at once
    ("neon_dotprod", "cortex-a76", "fast", 1),
    ("neon_dotprod", "cortex-a76", "exact", 1),
    ("neon_dotprod", "cortex-a76", "fast", 4),
    ("neon_dotprod", "cortex-a76", "exact", 2),
    ("neon", "cortex-a72", "fast", 1),
    ("neon", "cortex-a72", "exact", 1),
    ("neon", "cortex-a72", "fast", 2),
)


class _Context:
    def get_dummy_value(self) -> None:
        return None


def kernel_ir(intrinsic: Any, name: str, profile: str, tokens: int) -> tuple[str, int]:
    """A module whose function `kernel` takes int64 arguments, those of the intrinsic, for an instruction set; and how many."""
    kind = isa.SETS[name][0]
    leading = [typeof(kind(isa.PRIMITIVES[kind].lanes)), types.literal(tokens)]
    leading.insert(1, typeof(PRESETS[profile].activations))
    numbers = 12 if intrinsic is ternary_tile else 11
    signature, codegen = intrinsic._defn(None, *leading, *[types.int64] * numbers)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * numbers), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    codegen(_Context(), builder, signature, [None] * len(leading) + list(function.args))
    builder.ret_void()
    return str(module), numbers


def optimised(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """The module after the passes that Numba runs."""
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def innermost_loops(assembly: str) -> list[list[str]]:
    """The instructions of every loop that holds no other loop."""
    lines = [line.strip() for line in assembly.split("\n")]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    spans = []
    for end, line in enumerate(lines):
        target = re.match(r"(?:b\.\w+|[ct]bn?z|b|j\w+)\s.*?(\.LBB\w+)", line)
        if target and labels[target[1]] < end:
            spans.append((labels[target[1]], end))
    inner = [s for s in spans if not any(s != other and s[0] <= other[0] and other[1] <= s[1] for other in spans)]
    return [[line for line in lines[a : z + 1] if re.match("[a-z{]", line)] for a, z in inner]


def hot_loop(intrinsic: Any, name: str, profile: str, tokens: int, triple: str, core: str) -> list[str]:
    """The instructions of the kernel's one innermost loop, compiled for a core that need not be here."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=core, opt=3)
    code, _ = kernel_ir(intrinsic, name, profile, tokens)
    (loop,) = innermost_loops(machine.emit_assembly(optimised(code, machine)))
    return loop


@click.command()
def tile_code() -> None:
    """Count the instructions of the ternary product's loop on Arm, for 16 codes of one token and int8 plane.

    \b
    Example:
      python scripts/machines/tile_code.py
    """
    rows = []
    for name, core, profile, tokens in ARM_LOOPS:
        loop = hot_loop(ternary_tile, name, profile, tokens, ARM, core)
        kinds = Counter(line.split()[0] for line in loop)
        planes = PLANES[type(PRESETS[profile].activations)]
        each = round(len(loop) / 16 / tokens / planes, 2)
        products = {kind: count for kind, count in kinds.items() if kind in ("sdot", "smlal", "smlal2")}
        rows.append({"core": core, "profile": profile, "tokens": tokens, "products": products, "all": len(loop), "each": each})  # fmt: skip
        click.echo(f"{core} {profile:5} {tokens} tokens: {len(loop):3} instructions, {products}; {each} for 16 codes")
    click.echo(json.dumps({"rows": rows}))


if __name__ == "__main__":
    run_command(tile_code, "scripts/machines/tile_code.py")
