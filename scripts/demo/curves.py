"""The demo's picture: bits per byte over the tokens trained on, and the zero ratio during QAT."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tmexport.files import atomic_write

TEACHER, ROUNDED, STUDENT = "#4c72b0", "#8c8c8c", "#c44e52"


def read_metrics(checkpoint: Path) -> list[dict[str, Any]]:
    """The entries of a training's metrics.jsonl, one a step."""
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]


def draw_curves(teacher: Path | None, student: Path, results: dict[str, Any], out: Path) -> None:
    """Write the PNG `out` from the trainings' metrics (the teacher's too, if it was trained here) and the demo's results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    before, after = read_metrics(teacher) if teacher else [], read_metrics(student)
    scores = {name: model["bits_per_byte"] for name, model in results["models"].items()}
    switch = before[-1]["tokens"] / 1e6 if before else 0.0
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained")

    for entries, start, colour, label in (
        (before, 0.0, TEACHER, "teacher, full precision"),
        (after, switch, STUDENT, "ternary by QAT"),
    ):
        if not entries:
            continue
        tokens = [start + entry["tokens"] / 1e6 for entry in entries]
        left.plot(tokens, [entry["bits_per_byte"] for entry in entries], color=colour, alpha=0.25, linewidth=0.8)
        scored = [entry for entry in entries if "held_out_bits_per_byte" in entry]
        left.plot(
            [start + entry["tokens"] / 1e6 for entry in scored],
            [entry["held_out_bits_per_byte"] for entry in scored],
            "o-",
            color=colour,
            label=label,
        )
    left.plot([switch], [scores["rtn"]], "X", color=ROUNDED, markersize=10, label="ternary by rounding", zorder=5)
    left.axvline(switch, color=ROUNDED, linewidth=0.8, linestyle=":")
    named = None if before else "teacher, full precision"
    left.axhline(scores["teacher"], color=TEACHER, linewidth=0.8, linestyle="--", label=named)
    # The first steps from random weights would squeeze everything that follows.
    low = min(scores.values())
    left.set_ylim(low - 0.2, max(scores["rtn"], low + 0.8 if before else low) + (0.25 if before else 0.1))
    left.set(
        xlabel="tokens trained on, millions",
        ylabel="bits per byte",
        title="Held-out speeches (dots); training batches (pale)",
    )
    left.legend(loc="upper right")

    counted = [entry for entry in after if "zero_ratios" in entry]
    tokens = [entry["tokens"] / 1e6 for entry in counted]
    by_layer = [list(entry["zero_ratios"].values()) for entry in counted]
    right.fill_between(
        tokens,
        [min(r) for r in by_layer],
        [max(r) for r in by_layer],
        color=STUDENT,
        alpha=0.2,
        label="lowest to highest matrix",
    )
    right.plot(tokens, [entry["zero_ratio"] for entry in counted], "o-", color=STUDENT, markersize=3, label="mean")
    right.axhline(results["models"]["rtn"]["zero_ratio"], color=ROUNDED, linestyle="--", label="by rounding")
    right.set(xlabel="tokens of QAT, millions", title="Zero ratio", ylim=(0, 1))
    right.legend(loc="upper right")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    with atomic_write(out) as file:
        file.write(buffer.getbuffer())
