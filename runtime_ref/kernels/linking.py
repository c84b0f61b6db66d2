"""Compiling a kernel once: what it calls is linked into it, optimised with it, and is machine code nowhere else.

Numba compiles every function as if it were called by itself: each is optimised alone, then linked, then optimised twice more and made
machine code, and all of that again where it is part of a larger one. A forward pass is made of functions that nobody calls by
themselves, so the code of a `Part` stays as it was lowered, and LLVM sees it once, in the `Whole` that calls it. No bits depend on
it: nothing here allows LLVM another arithmetic than the one written.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from llvmlite.binding import Linkage
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager

# Of Numba's pipeline, what does nothing for kernels: they hold no closures, `with`, array expressions, literal loops or messages
_NEEDLESS = {
    "WithLifting", "InlineClosureLikes", "RewriteDynamicRaises", "MakeFunctionToJitFunction", "FindLiterallyCalls", "LiteralUnroll",
    "LiteralPropagationSubPipelinePass", "InlineOverloads", "NopythonRewrites", "AnnotateTypes", "DumpParforDiagnostics",
}  # fmt: skip


class _Lowered(JITCodeLibrary):
    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout


@ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
def _no_entry(function: int, arguments: int, keywords: int) -> None:
    """What Python would call: returns NULL, so that a call by itself is a SystemError and not a crash."""


class _PartLibrary(_Lowered):
    """The code of one function, to be linked into others only."""

    def _optimize_final_module(self) -> None:
        """Left to the kernel that this becomes a part of."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return ctypes.cast(_no_entry, ctypes.c_void_p).value or 0

    @property
    def codegen(self) -> Any:
        """The environment of a part has no place, as after a load from the cache: exceptions with values need it."""
        return SimpleNamespace(set_env=lambda name, env: None)


class _WholeLibrary(_Lowered):
    """The code that the engine calls, with all parts in it."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr:  # of a part
                # Nothing else calls this copy, so LLVM may change what it takes and returns. An internal one would keep its
                # name in the engine's table, where a later object's weak symbol of that name is taken for it.
                function.linkage = Linkage.private
        builder = self._codegen._pass_builder(opt=2, loop_vectorize=True, slp_vectorize=False)
        builder.getModulePassManager().run(self._final_module, builder)


class _Compiler(CompilerBase):
    library: type[JITCodeLibrary]

    def define_pipelines(self) -> list[PassManager]:
        if self.state.library is None:
            codegen = self.state.targetctx.codegen()
            self.state.library = self.library(codegen, self.state.func_id.func_qualname)
            self.state.library.enable_object_caching()
        passes = PassManager("kernel")
        for kind, about in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            if kind.__name__ not in _NEEDLESS:
                passes.add_pass(kind, about)
        passes.finalize()
        return [passes]


class Part(_Compiler):
    """Numba's pipeline_class for functions that only other compiled functions call."""

    library = _PartLibrary


class Whole(_Compiler):
    """Numba's pipeline_class for a function that the engine or Python calls."""

    library = _WholeLibrary
