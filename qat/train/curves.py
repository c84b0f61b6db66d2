"""The training curves of a run as a PNG."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tmexport.files import atomic_write


def draw_curves(metrics: Path, out: Path) -> None:
    """Bits per byte (training and held-out), learning rate and zero ratio over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    tokens = [entry["tokens"] for entry in entries]
    predicting = [entry for entry in entries if "bits_per_byte" in entry]  # not while layers were aligned
    axes[0].plot(
        [entry["tokens"] for entry in predicting],
        _smooth([entry["bits_per_byte"] for entry in predicting]),
        label="training (smoothed)",
    )
    scored = [entry for entry in entries if "held_out_bits_per_byte" in entry]
    if scored:
        axes[0].plot(
            [entry["tokens"] for entry in scored],
            [entry["held_out_bits_per_byte"] for entry in scored],
            "o-",
            label="held out",
        )
    axes[0].set(title="bits per byte", xlabel="tokens")
    axes[0].legend()
    axes[1].plot(tokens, [entry["lr"] for entry in entries])
    axes[1].set(title="learning rate", xlabel="tokens")
    counted = [entry for entry in entries if "zero_ratios" in entry]
    for name in counted[-1]["zero_ratios"] if counted else ():
        short = name.removeprefix("backbone.layers.").replace(".mixer.", " ")
        axes[2].plot([e["tokens"] for e in counted], [e["zero_ratios"][name] for e in counted], label=short)
    axes[2].set(title="zero ratio" if counted else "zero ratio (not ternary)", xlabel="tokens", ylim=(0, 1))
    if len(counted) > 0 and len(counted[-1]["zero_ratios"]) <= 16:
        axes[2].legend(fontsize="x-small", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    with atomic_write(out) as file:
        file.write(buffer.getbuffer())


def _smooth(values: list[float], decay: float = 0.9) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else decay * smooth[-1] + (1 - decay) * value)
    return smooth
