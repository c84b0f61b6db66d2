"""Compiled functions of this very process, executed by Bochs's CPU: instructions that the real CPU lacks still run.

The emulated CPU (an Intel Sapphire Rapids: AVX512-VNNI and AVX-VNNI) sees this process's memory at its own addresses, so a
function works on the arrays where they are. Linux on x86-64; needs the package bochscpu-python and a C compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import TmexportError

PAGE, REGION = 1 << 12, 1 << 30
STACK, HEAP = 8 << 20, 32 << 20  # malloc accepts no threshold above 32 MiB
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Present, writable; and for an entry that maps a whole region at once.
TABLE, LARGE = 0x3, 0x83
PACKAGE = "bochscpu-python==0.4.0"
HLT = b"\xf4"
EXCEPTIONS = {0: "division error", 6: "invalid instruction", 13: "general protection", 14: "page fault"}

# bochscpu chooses Bochs's model "corei3_cnl", which has no VNNI: another one takes that function's name. It is also built
# for glibc 2.38; the two names that an older one lacks go to the functions they stand for.
SHIM = """
.macro forward name, to
.globl \\name
.type \\name, @function
\\name: jmp \\to@PLT
.endm
forward _Z23create_corei3_cnl_cpuidP8BX_CPU_C, _Z28create_sapphire_rapids_cpuidP8BX_CPU_C
forward __isoc23_strtoull, strtoull
forward __isoc23_sscanf, sscanf
.section .note.GNU-stack,"",@progbits
"""


class EmulationError(TmexportError):
    """The emulator cannot be had, or what it ran failed."""


def require() -> None:
    """Raises EmulationError, saying what to install, where there is no emulator."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EmulationError(f"this is {sys.platform} on {platform.machine()}; expected Linux on x86-64")
    if shutil.which("cc") is None:
        raise EmulationError("no C compiler `cc` was found; run: apt-get install gcc")
    if importlib.util.find_spec("bochscpu") is None:
        raise EmulationError(f"bochscpu is not installed; run: pip install --no-deps {PACKAGE}")


def _bochscpu() -> Any:
    """The module, with our model of CPU and every symbol it needs."""
    require()
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "shim.s", Path(folder) / "shim.so"
        source.write_text(SHIM)
        done = subprocess.run(["cc", "-shared", "-o", library, source], capture_output=True, text=True)
        if done.returncode:
            raise EmulationError(f"cc cannot build a shared library: {' '.join(done.stderr.split())}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL | os.RTLD_LAZY)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    try:
        import bochscpu.cpu
        import bochscpu.memory
    except ImportError as error:
        raise EmulationError(f"bochscpu cannot be loaded ({error}); expected {PACKAGE}") from None
    finally:
        sys.setdlopenflags(flags)
    return bochscpu


class EmulatedCpu:
    """One CPU. `call(address, *arguments)` is what a C caller does; whoever calls holds the GIL all the time."""

    def __init__(self) -> None:
        self._bochs = _bochscpu()
        self._memory = self._bochs.memory
        self._mapped: set[int] = set()  # pages, by address
        self._regions: dict[int, int] = {}  # of virtual memory -> of physical memory, both in GiB
        self._tables: dict[int, np.ndarray] = {}
        self._next_table = 0
        self._root_at, self._root = self._table()
        self._stack = np.zeros(STACK, np.uint8)
        self._halt = np.frombuffer(bytearray(HLT), np.uint8)
        self._failure = ""

    def call(self, address: int, integers: list[int], floats: list[np.floating]) -> int:
        """The result in rax of a function that takes these arguments in the System V order; at most 8 floats.

        Raises:
            EmulationError: it ended with a processor exception.
        """
        _fill_heap()
        self._map_everything()
        state = self._state()
        in_registers, on_stack = integers[:6], integers[6:]
        for name, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), in_registers, strict=False):
            setattr(state, name, value % 2**64)
        words = [self._halt.ctypes.data, *(value % 2**64 for value in on_stack)]
        top = (self._stack.ctypes.data + STACK - 8 * len(words)) & -16
        top -= 8  # a function finds its return address 8 bytes below a multiple of 16
        ctypes.memmove(top, struct.pack(f"<{len(words)}Q", *words), 8 * len(words))
        registers = state.zmm
        for register, number in zip(registers, floats, strict=False):
            low = int.from_bytes(number.tobytes(), "little")
            register.q = [low, *[0] * 7]
        state.zmm = registers
        state.rsp, state.rip = top, address
        session = self._bochs.Session()
        session.missing_page_handler = self._missing
        hook = self._bochs.Hook()
        hook.exception = self._exception
        hook.hlt = lambda session, _: session.stop()
        session.cpu.state = state
        self._failure = ""
        session.run([hook])
        result = session.cpu.state
        if self._failure or result.rip - 1 != self._halt.ctypes.data:
            raise EmulationError(self._failure or f"the emulated CPU stopped at {result.rip:#x}")
        return result.rax

    def _exception(self, session: Any, _: int, vector: int, code: int) -> None:
        at = session.cpu.rip
        raw = ctypes.string_at(at, 12).hex() if at & -PAGE in self._mapped else "?"
        self._failure = (
            f"{EXCEPTIONS.get(vector, f'exception {vector}')} at {at:#x} ({raw}), address {session.cpu.cr2:#x}"
        )
        session.stop()

    def _missing(self, physical: int) -> None:
        """An address in a mapped GiB but in no page of ours. bochscpu can neither stop here nor let an exception through."""
        print(
            f"error: the emulated code left this process's memory, at physical address {physical:#x}", file=sys.stderr
        )
        os._exit(1)

    def _table(self) -> tuple[int, np.ndarray]:
        """A new page table: its physical address, and its 512 entries."""
        raw = np.zeros(2 * PAGE, np.uint8)
        start = -raw.ctypes.data % PAGE
        entries = raw[start : start + PAGE].view(np.uint64)
        self._next_table += PAGE
        self._memory.page_insert(self._next_table, entries.ctypes.data)
        return self._next_table, entries

    def _map_everything(self) -> None:
        """Give the emulated CPU every page that this process can read, before it runs: no callback while it runs."""
        for start, end in _readable():
            for page in range(start, end, PAGE):
                if page not in self._mapped:
                    self._mapped.add(page)
                    self._memory.page_insert(self._physical(page), page)

    def _physical(self, address: int) -> int:
        """Where an address is in physical memory, which has 40 bits only: its GiB are handed out as they are needed."""
        region, inside = divmod(address, REGION)
        if region not in self._regions:
            physical = self._regions[region] = len(self._regions) + 1
            upper, entry = divmod(region, 512)
            if upper not in self._tables:
                where, self._tables[upper] = self._table()
                self._root[upper] = where | TABLE
            self._tables[upper][entry] = physical * REGION | LARGE
        return self._regions[region] * REGION + inside

    def _state(self) -> Any:
        """64-bit mode with every vector register enabled, as Linux sets it up, and this thread's local storage."""
        state = self._bochs.State()
        self._bochs.cpu.set_long_mode(state)
        state.cr0, state.cr3 = 0x80050033, self._root_at
        state.cr4 = 0x40620  # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        state.xcr0 = 0xE7  # x87, SSE, AVX, and the three of AVX-512
        state.rflags, state.mxcsr = 2, 0x1F80
        state.cs = self._segment(0xA09B, 0x08, 0)
        state.ss = state.ds = state.es = state.gs = self._segment(0xC093, 0x10, 0)
        pthread_self = ctypes.CDLL(None).pthread_self
        pthread_self.restype = ctypes.c_size_t
        state.fs = self._segment(0xC093, 0x10, pthread_self())
        return state

    def _segment(self, attributes: int, selector: int, base: int) -> Any:
        segment = self._bochs.Segment()
        segment.present, segment.limit = True, 0xFFFFFFFF
        segment.attr, segment.selector, segment.base = attributes, selector, base
        return segment


def _fill_heap() -> None:
    """Give malloc what compiled code may ask of it: an emulated CPU has no kernel to get more from, and would stop with malloc's lock held."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)  # what is freed stays malloc's,
    libc.mallopt(M_MMAP_THRESHOLD, HEAP)  # and large arrays come from it too
    libc.free(libc.malloc(HEAP - PAGE))


def _readable() -> Iterator[tuple[int, int]]:
    """First and last address of what this process may read."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
        if found and "[v" not in line:  # the kernel's own pages
            yield int(found[1], 16), int(found[2], 16)


def native_arguments(values: tuple[Any, ...]) -> tuple[list[int], list[np.floating]]:
    """Arguments as a Numba function takes them from native code: arrays and tuples in parts; integers, and floats."""
    integers: list[int] = []
    floats: list[np.floating] = []
    for value in values:
        if isinstance(value, tuple):
            inner = native_arguments(value)
            integers += inner[0]
            floats += inner[1]
        elif isinstance(value, np.ndarray):  # no owner, no parent
            integers += [0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]
        elif isinstance(value, float | np.floating):
            floats.append(np.float64(value) if isinstance(value, float) else value)
        else:
            integers.append(int(value))
    return integers, floats


class EmulatedFunction:
    """A Numba dispatcher whose compiled code Bochs executes."""

    def __init__(self, dispatcher: Any, cpu: EmulatedCpu) -> None:
        self._dispatcher, self._cpu = dispatcher, cpu
        self.compile: Callable[..., Any] = dispatcher.compile

    @property
    def signatures(self) -> list[Any]:
        return self._dispatcher.signatures

    def assembly(self) -> list[str]:
        """Of every signature compiled in this process."""
        return [compiled.library.get_asm_str() for compiled in self._dispatcher.overloads.values()]

    def __call__(self, *values: Any) -> None:
        from numba import typeof

        signature = tuple(typeof(value) for value in values)
        self._dispatcher.compile(signature)
        compiled = self._dispatcher.overloads[signature]
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        integers, floats = native_arguments(values)
        outputs = np.zeros(2, np.uint64)  # the result, None, and the exception
        start = outputs.ctypes.data
        status = self._cpu.call(address, [start, start + 8, *integers], floats) & 0xFFFFFFFF
        if status:
            raise EmulationError(f"the compiled function returned status {status}")
