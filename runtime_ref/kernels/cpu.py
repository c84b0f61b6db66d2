"""The features of the CPU, by LLVM's names: what compiled code may use."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

import llvmlite.binding as llvm
from numba import config

AT_HWCAP, HWCAP_ASIMDDP = 16, 1 << 20  # Linux: sys/auxv.h, asm/hwcap.h
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = (
    158,
    0x1023,
    18,
)  # Linux, x86-64: asm/unistd_64.h, asm/prctl.h, asm/fpu/types.h


def features() -> set[str]:
    """What Numba may compile for: the features in NUMBA_CPU_FEATURES ("+avx2,+f16c") if that is set, else the CPU's own.

    64-bit Arm always has NEON.
    """
    if config.CPU_FEATURES is None:
        found = {name for name, has in llvm.get_host_cpu_features().items() if has}
        if not config.ENABLE_AVX:  # NUMBA_ENABLE_AVX=0: Numba then compiles for the host without these
            found = {name for name in found if not name.startswith("avx")}
        if _hwcap() & HWCAP_ASIMDDP and _core_is_known():
            found.add("dotprod")  # LLVM 22 does not look for it: a core's name implies it
    else:
        found = {word[1:] for word in config.CPU_FEATURES.replace(" ", "").split(",") if word.startswith("+")}
    if "amx-tile" in found and not _tiles_permitted():
        found.discard("amx-tile")
    return found | {"neon"} if _is_arm64() else found


def core() -> str:
    """LLVM's name of the core that Numba compiles for."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _is_arm64() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")  # Windows says ARM64


@functools.cache
def _tiles_permitted() -> bool:
    """Whether Linux lets this process use AMX: a process has to ask for the 8 KB of registers, once for all its threads."""
    if sys.platform != "linux" or not is_x86():
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


def _hwcap() -> int:
    """What Linux says of an Arm core, in bits; 0 elsewhere."""
    if not (_is_arm64() and sys.platform == "linux"):
        return 0
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return getauxval(AT_HWCAP)


def _core_is_known() -> bool:
    """Whether Numba compiles for this very core: for a generic one, LLVM stops the process at an sdot."""
    return config.CPU_NAME is None and llvm.get_host_cpu_name() != "generic"
