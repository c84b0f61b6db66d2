"""Opening and closing for ever: no memory, no descriptor and no map is kept. The long form: scripts/faults/soak.py."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from statistics import median

import pytest

from tests.hostile.builders import Q2_0, checkpoint, model
from tests.hostile.targets import accepts_gguf, read_checkpoint, read_gguf


def resident() -> int:
    """Bytes of anonymous memory: file maps come and go with the page cache."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def cycles(action, count: int) -> tuple[int, int]:
    """Median growth of memory (bytes) of three rounds of `count` calls, and that of open descriptors in all, after a tenth as many to warm up.

    What leaks grows in most rounds; what the process does besides (a huge page of 2 MiB from the kernel, a thread that an
    earlier test left) in one.
    """
    for _ in range(count // 10):
        action()
    gc.collect()
    descriptors, growths = len(os.listdir("/proc/self/fd")), []
    for _ in range(3):
        memory = resident()
        for _ in range(count):
            action()
        gc.collect()
        growths.append(resident() - memory)
    return int(median(growths)), len(os.listdir("/proc/self/fd")) - descriptors


def test_a_thousand_ggufs(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(model(Q2_0).build())
    memory, descriptors = cycles(lambda: read_gguf(path), 1000)
    assert descriptors == 0
    assert memory < 2**20
    assert maps_of(path) == 0


def test_hundreds_of_refusals(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(model(Q2_0).build()[:-1000])
    memory, descriptors = cycles(lambda: accepts_gguf(path) and pytest.fail("accepted"), 300)
    assert descriptors == 0
    assert memory < 2**20
    assert maps_of(path) == 0


def test_hundreds_of_checkpoints(tmp_path):
    folder = checkpoint(tmp_path)
    memory, descriptors = cycles(lambda: read_checkpoint(folder), 300)
    assert descriptors == 0
    assert memory < 2**20
    assert maps_of(folder) == 0
