"""What the numbers were measured on: the board, its processor, its clock and temperature, and our libraries.

Everything is read below `root`, so that a made-up tree can stand for another machine. What a machine does not tell is
None or missing, never guessed.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path("/")
PACKAGES = ("tmexport", "numpy", "numba", "llvmlite")

# "CPU part" of /proc/cpuinfo where "CPU implementer" is 0x41 (Arm; Linux, arch/arm64/include/asm/cputype.h)
_ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78", 0xD49: "Neoverse-N2", 0xD4F: "Neoverse-V2",
}  # fmt: skip

# bits of the Raspberry Pi firmware's get_throttled; 16 bits higher: has happened since the start
_THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


def describe(root: Path = ROOT) -> dict[str, Any]:
    """The machine, as JSON can hold it: `hardware`, and the versions of Python and our libraries.

    Keys: board, cpu, cores, memory_bytes, caches, governor, max_mhz, isa, system, python, and one for each package.
    """
    return hardware(root) | {"isa": _isa(), "system": f"{platform.system()} {platform.release()}",
                             "python": platform.python_version()} | _versions(PACKAGES)  # fmt: skip


def hardware(root: Path = ROOT) -> dict[str, Any]:
    """The board's and the processor's names, cores, memory, caches, governor and highest clock."""
    cpuinfo = _cpuinfo(root)
    board = (
        _text(root / "proc/device-tree/model") or cpuinfo.get("Model") or _text(root / "sys/class/dmi/id/product_name")
    )
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    highest = _number(frequency / "cpuinfo_max_freq")
    return {
        "board": board,
        "cpu": _cpu_name(cpuinfo),
        "cores": _cores(root),
        "memory_bytes": _memory(root),
        "caches": _caches(root),
        "governor": _text(frequency / "scaling_governor"),
        "max_mhz": None if highest is None else highest / 1000,
    }


def conditions(root: Path = ROOT) -> dict[str, Any]:
    """What changes while a machine works: clock in MHz, temperature by zone in Celsius, and signs of throttling."""
    current = _number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    zones: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        value, name = _number(zone / "temp"), _text(zone / "type") or zone.name
        if value is not None:
            zones[name if name not in zones else f"{name} ({zone.name})"] = value / 1000
    return {
        "mhz": None if current is None else current / 1000,
        "temperature_c": zones,
        "throttled": throttled(root),
        "throttle_count": _number(root / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"),
    }


def throttled(root: Path = ROOT) -> list[str] | None:
    """A Raspberry Pi's flags in words, an empty list where none is set; None on other boards."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        flags = int(text or "", 16)
    except ValueError:
        return None
    now = [f"{name} now" for bit, name in enumerate(_THROTTLED) if flags >> bit & 1]
    return now + [f"{name} since the start" for bit, name in enumerate(_THROTTLED) if flags >> (16 + bit) & 1]


def _text(path: Path) -> str | None:
    """A small file's text without the NUL that ends a device tree's; None if it is missing, unreadable or empty."""
    try:
        return path.read_bytes()[:4096].decode("utf-8", "replace").strip("\0 \n\t") or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first value of each key of /proc/cpuinfo."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in reversed(lines) if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_name(cpuinfo: dict[str, str]) -> str:
    if "model name" in cpuinfo:
        return cpuinfo["model name"]
    try:
        if int(cpuinfo["CPU implementer"], 16) == 0x41:
            return _ARM_PARTS[int(cpuinfo["CPU part"], 16)]
    except (KeyError, ValueError):
        pass
    return platform.processor() or platform.machine()


def _cores(root: Path) -> int | None:
    """Cores that are on: "0-3,6" of the kernel's list is 5."""
    text = _text(root / "sys/devices/system/cpu/online")
    try:
        ends = [part.split("-") for part in (text or "").split(",")]
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    except ValueError:
        return None


def _memory(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemTotal:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _caches(root: Path) -> dict[str, str]:
    """The first core's caches: {"L1d": "64K", "L2": "512K"}."""
    found = {}
    for folder in sorted(root.glob("sys/devices/system/cpu/cpu0/cache/index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def _isa() -> str:
    from runtime_ref.kernels.isa import select

    return type(select()).__name__.lower()


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
