"""The Numba kernels: the same bits as `runtime_ref.reference`, faster. Importing this package checks Numba's settings first."""

from __future__ import annotations

import os
import re

from tmexport.errors import UsageError


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


check_settings()
