"""The Numba kernels: the same bits as `runtime_ref.reference`, faster. Importing this package checks Numba's settings first."""

from __future__ import annotations

import os
import re
import warnings

import llvmlite.binding as llvm

from tmexport.errors import UsageError
from tmexport.library_errors import lines_on_stderr


def check_settings() -> None:
    """Refuse what Numba and LLVM take from the environment and then fail on with an abort or far from the cause.

    Raises:
        UsageError: the variable is named.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0").strip() not in ("", "0"):
        raise UsageError("NUMBA_DISABLE_JIT is set, and the kernels exist only as compiled code; unset it")
    threads = os.environ.get("NUMBA_NUM_THREADS", "1").strip()
    if re.fullmatch(r"-?\d+", threads) and int(threads) < 1:
        raise UsageError(f"NUMBA_NUM_THREADS is {threads}; expected 1 or more, or unset it (the runtime has --threads)")
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    for feature in filter(None, features.split(",")):
        if not re.fullmatch(r"[+-][\w.-]+", feature):
            raise UsageError(
                f"NUMBA_CPU_FEATURES holds {feature!r}; expected names with + or - before each: +avx2,+f16c"
            )

    trace = os.environ.get("NUMBA_CHROME_TRACE", "")  # Numba opens it as Python ends, when all is said
    place = trace if os.path.exists(trace) else os.path.dirname(os.path.abspath(trace))
    if trace and (os.path.isdir(trace) or not os.access(place, os.W_OK)):
        raise UsageError(f"NUMBA_CHROME_TRACE is {trace!r}, where no file can be written; correct it, or unset it")
    for variable, word in (("NUMBA_CPU_NAME", "cpu"), ("NUMBA_CPU_FEATURES", "features")):
        said = _said_by_llvm(**{word: os.environ[variable]}) if os.environ.get(variable) else ""
        if said:
            raise UsageError(f"{variable} is {os.environ[variable]!r}; LLVM says: {said}")
    _import_numba()


def _said_by_llvm(**target: str) -> str:
    """The first line that LLVM writes to stderr when asked to compile for a core or features: it has no other answer."""
    llvm.initialize_native_target()
    machine = llvm.Target.from_default_triple()
    with lines_on_stderr() as said:
        machine.create_target_machine(**target)
    return said[0] if said else ""


def _import_numba() -> None:
    """Numba warns, with a traceback, of a variable it cannot read, and goes on without it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Environment variable", RuntimeWarning)
        try:
            import numba  # noqa: F401
        except RuntimeWarning as warning:
            raise UsageError(f"{str(warning).strip().splitlines()[0]} Correct it, or unset it") from None
        except Exception as error:  # NUMBA_COLOR_SCHEME: a KeyError
            given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
            if isinstance(error, ImportError) or not given:
                raise
            raise UsageError(
                f"Numba does not start with {' '.join(given)}: {type(error).__name__} {error}; correct it, or unset it"
            ) from None


check_settings()
