"""How many threads a command uses by default: the cores that it may use, and no more CPUs than its container is allowed.

A container with a quota of one CPU still sees every core of the machine; two threads that wait for each other at barriers
then take turns at being stopped and are slower than one (1.2 to 5.6 times, measured).
"""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """The cores in this process's affinity, or the whole CPUs of its cgroup's quota where those are fewer; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """The CPUs that this process's control groups (version 1 and 2) allow, the fewest of all levels; None without a limit.

    `proc` holds `cgroup` and `mountinfo`, as proc(5) describes them.
    """
    try:
        groups = _groups((proc / "cgroup").read_text())
        mounts = _mounts((proc / "mountinfo").read_text())
    except (OSError, ValueError):  # not Linux, or a /proc that hides them
        return None
    quotas = []
    for kind, root, point in mounts:
        if kind in groups:
            quotas += [_quota(folder) for folder in _levels(groups[kind], root, Path(point))]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(text: str) -> dict[str, str]:
    """{"v1": path, "v2": path} from lines such as `4:cpu,cpuacct:/docker/1f` and `0::/user.slice`."""
    found = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            found["v1"] = path
        elif number == "0" and not controllers:
            found["v2"] = path
    return found


def _mounts(text: str) -> list[tuple[str, str, str]]:
    """(kind, root in the hierarchy, mount point) of the cgroup file systems that can hold a quota."""
    found = []
    for line in text.splitlines():
        mount, _, system = line.partition(" - ")
        fields, kind = mount.split(" "), system.split(" ")
        if kind[0] == "cgroup2":
            found.append(("v2", fields[3], _unescape(fields[4])))
        elif kind[0] == "cgroup" and "cpu" in kind[-1].split(","):
            found.append(("v1", fields[3], _unescape(fields[4])))
    return found


def _unescape(path: str) -> str:
    """proc(5) writes a space in a path as \\040."""
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _levels(path: str, root: str, point: Path) -> list[Path]:
    """The folders of the group and of those above it, as far up as is mounted here."""
    inside = path.removeprefix(root.rstrip("/")) if path.startswith(root.rstrip("/") + "/") else ""
    parts = [part for part in inside.split("/") if part not in ("", ".", "..")]
    return [point.joinpath(*parts[:n]) for n in range(len(parts) + 1)]


def _quota(folder: Path) -> float | None:
    """cpu.max ("150000 100000", "max 100000") or cpu.cfs_quota_us and cpu.cfs_period_us (-1: no limit)."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def own_cpus(threads: int, root: Path = Path("/")) -> list[set[int]] | None:
    """CPUs for each of `threads` threads that work together, no CPU in two sets; None where they are better left alone.

    All CPUs of this process's affinity are dealt out: the fastest first (cpu_capacity, where cores differ), hardware threads of
    a core to one thread. None for one thread, for more threads than CPUs or than the cgroup's quota, and where the system has
    no affinity.
    """
    if threads < 2 or not hasattr(os, "sched_getaffinity"):
        return None
    cpus, quota = sorted(os.sched_getaffinity(0)), cpu_quota()
    if threads > len(cpus) or (quota is not None and threads > quota):
        return None
    folder = root / "sys/devices/system/cpu"
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        cores.setdefault(_read(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu), []).append(cpu)
    parts = list(cores.values()) if threads <= len(cores) else [[cpu] for cpu in cpus]
    parts.sort(key=lambda part: -int(_read(folder / f"cpu{part[0]}/cpu_capacity") or 0))  # stable: in their order
    return [{cpu for part in parts[thread::threads] for cpu in part} for thread in range(threads)]


def running(root: Path = Path("/")) -> int | None:
    """Threads of the whole system that run or could run now, the caller included (proc(5): loadavg); None if it is not told."""
    try:
        return int(_read(root / "proc/loadavg").split()[3].split("/")[0])
    except (LookupError, ValueError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
