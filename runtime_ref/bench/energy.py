"""Energy that a machine reports about itself: RAPL counters of x86 processors, INA power sensors of boards.

RAPL (Linux, Documentation/power/powercap): energy_uj counts microjoules and wraps at max_energy_range_uj; root only on
most systems. INA (Documentation/hwmon/ina2xx): power1_input is the present power in microwatts, so it is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05  # seconds between samples of a power sensor


@dataclass(frozen=True)
class Meter:
    """One source. `file` holds microjoules that wrap at `wrap` (a counter), or microwatts (wrap None)."""

    name: str
    file: Path
    wrap: int | None


def find_meters(root: Path = Path("/")) -> list[Meter]:
    """The sources that exist and can be read: whole RAPL packages (not their parts), and chips named ina*."""
    meters = []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name, wrap = _line(zone / "name"), _line(zone / "max_energy_range_uj")
        if name.startswith("package") and wrap.isdigit():
            meters.append(Meter(f"RAPL {name}", zone / "energy_uj", int(wrap)))
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        name = _line(chip / "name")
        if name.startswith("ina"):
            meters.append(Meter(f"{name} ({chip.name})", chip / "power1_input", None))
    return [meter for meter in meters if _read(meter) is not None]


class EnergyRun:
    """Joules by source over a `with` block; a source that fails on the way is left out.

    with EnergyRun(find_meters()) as run:
        ...
    run.joules()       # {"RAPL package-0": 12.5}
    """

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = list(meters)
        self._readings: dict[str, list[tuple[float, int | None]]] = {m.name: [] for m in meters}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EnergyRun:
        self._sample(self._meters)
        sensors = [m for m in self._meters if m.wrap is None]
        if sensors:
            thread = threading.Thread(target=self._watch, args=(sensors,), daemon=True)
            thread.start()
            self._thread = thread  # only now: the exit waits for it
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._sample(self._meters)

    def joules(self) -> dict[str, float]:
        """What each source gave, after the block."""
        result = {}
        for meter in self._meters:
            readings = self._readings[meter.name]
            if all(value is not None for _, value in readings):
                pairs = [(at, value) for at, value in readings if value is not None]
                result[meter.name] = (
                    integral(pairs) if meter.wrap is None else used(pairs[0][1], pairs[-1][1], meter.wrap)
                )
        return result

    def _watch(self, sensors: list[Meter]) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample(sensors)

    def _sample(self, meters: list[Meter]) -> None:
        for meter in meters:
            self._readings[meter.name].append((time.perf_counter(), _read(meter)))


def used(before: int, after: int, wrap: int) -> float:
    """Joules between two readings in microjoules of a counter that starts again after `wrap`."""
    return (after - before if after >= before else after + wrap - before) / 1e6


def integral(samples: Sequence[tuple[float, int]]) -> float:
    """Joules from (seconds, microwatts), by the trapezoidal rule."""
    steps = itertools.pairwise(samples)
    return sum((t1 - t0) * (p0 + p1) / 2e6 for (t0, p0), (t1, p1) in steps)


def _line(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def _read(meter: Meter) -> int | None:
    text = _line(meter.file)
    return int(text) if text.isdigit() else None
