"""A shared library made in memory, with one function that jumps to an address of this process.

onnxruntime loads custom operators from a file: `dlopen`, then the symbol RegisterCustomOps. Our operators are compiled in this process,
so all that the file has to hold is a jump. Some 600 bytes need neither compiler nor linker, and Linux opens them from memory
(`memfd_create`): nothing is written to a disk. Layout: System V ABI, "Object Files" and "Dynamic Linking"; the processors' supplements.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from functools import cache

SYMBOL = "RegisterCustomOps"
_PAGE = 0x10000  # aarch64 has pages of up to 64 kB
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT = 4, 5, 6, 10, 11
_GLOBAL_FUNCTION = 1 << 4 | 2


def jump_x86_64(address: int) -> bytes:
    """endbr64; movabs rax, address; jmp rax."""
    return b"\xf3\x0f\x1e\xfa\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"


def jump_aarch64(address: int) -> bytes:
    """ldr x16, the 8 bytes behind the next instruction; br x16."""
    return struct.pack("<IIQ", 0x58000050, 0xD61F0200, address)


# e_machine of the ELF header, and the code
_MACHINES = {"x86_64": (62, jump_x86_64), "aarch64": (183, jump_aarch64)}


def supported() -> bool:
    """Whether this system can load such a library."""
    return (
        sys.platform == "linux"
        and sys.maxsize > 2**32
        and platform.machine() in _MACHINES
        and hasattr(os, "memfd_create")
    )


def elf(machine: str, address: int) -> bytes:
    """The library for a processor; its function jumps to `address`."""
    number, jump = _MACHINES[machine]
    code = jump(address)
    strings = b"\0" + SYMBOL.encode() + b"\0"
    headers = 64 + 4 * 56
    hash_at = headers
    table = struct.pack("<5I", 1, 2, 1, 0, 0)  # one bucket, which begins with symbol 1; two chains
    symbols_at = -(-(hash_at + len(table)) // 8) * 8
    strings_at = symbols_at + 2 * 24
    code_at = -(-(strings_at + len(strings)) // 16) * 16
    dynamic_at = -(-(code_at + len(code)) // 16) * 16
    symbol = struct.pack("<IBBHQQ", 1, _GLOBAL_FUNCTION, 0, 1, code_at, len(code))
    entries = {
        _DT_HASH: hash_at,
        _DT_STRTAB: strings_at,
        _DT_SYMTAB: symbols_at,
        _DT_STRSZ: len(strings),
        _DT_SYMENT: 24,
        0: 0,
    }
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries.items())
    end = dynamic_at + len(dynamic)
    moved = dynamic_at + _PAGE  # in memory: the loader may write to this page
    segments = (
        (_PT_LOAD, _READ | _EXECUTE, 0, 0, dynamic_at, _PAGE),
        (_PT_LOAD, _READ | _WRITE, dynamic_at, moved, len(dynamic), _PAGE),
        (_PT_DYNAMIC, _READ | _WRITE, dynamic_at, moved, len(dynamic), 8),
        (_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 16),  # without it the loader would ask for an executable stack
    )
    file = bytearray(end)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)  # 64 bits, little-endian, version 1, System V
    struct.pack_into("<16sHHIQQQIHHHHHH", file, 0, identity, 3, number, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    for i, (kind, flags, offset, place, size, align) in enumerate(segments):
        struct.pack_into("<IIQQQQQQ", file, 64 + 56 * i, kind, flags, offset, place, place, size, size, align)
    parts = ((hash_at, table), (symbols_at + 24, symbol), (strings_at, strings), (code_at, code), (dynamic_at, dynamic))
    for at, part in parts:
        file[at : at + len(part)] = part
    return bytes(file)


@cache
def library_of(address: int) -> str:
    """The path of a library for this processor, which lives as long as the process.

    Raises:
        OSError: the system makes no files in memory, or runs no code from them.
    """
    descriptor = os.memfd_create("tmexport-operators")
    os.write(descriptor, elf(platform.machine(), address))
    path = f"/proc/self/fd/{descriptor}"
    ctypes.CDLL(path)
    return path
