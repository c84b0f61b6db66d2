"""The metrics of a run for TensorBoard: the scalars of metrics.jsonl, written anew from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tmexport.errors import UsageError


@contextlib.contextmanager
def tensorboard(folder: Path, metrics: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes an entry of metrics.jsonl; the entries already in `metrics` come first.

    The event files in `folder` are made anew, so that a run that is resumed shows every step once.

    Raises:
        UsageError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs tensorboard; install it with: pip install tensorboard") from None
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:

        def add(entry: dict[str, Any]) -> None:
            for name, value in entry.items():
                if name == "zero_ratios":
                    for module, ratio in value.items():
                        writer.add_scalar(f"zero_ratio/{module}", ratio, entry["step"])
                elif name != "step":
                    writer.add_scalar(name, value, entry["step"])

        if metrics.is_file():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                add(json.loads(line))
        yield add
