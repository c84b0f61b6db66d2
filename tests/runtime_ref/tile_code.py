"""A tile kernel by itself, as LLVM code: what Numba would inline into the forward pass."""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import typeof, types

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import isa
from runtime_ref.kernels.tiles import ternary_tile


class _Context:
    def get_dummy_value(self):
        return None


def kernel_ir(intrinsic, name, profile, tokens):
    """A module whose function `kernel` takes the int64 arguments of the intrinsic, for an instruction set."""
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


def optimised(text, machine):
    """The module after the passes that Numba runs."""
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return parsed
