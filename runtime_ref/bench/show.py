"""A result of the bench as text, and as a PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runtime_ref.bench.compare import Ratio
from runtime_ref.bench.svg import number


def show(result: dict[str, Any]) -> None:
    """The results as text."""
    click.echo(f"{result['machine']['cpu']}, {result['machine']['isa']}; {result['file_bytes'] / 1e6:.1f} MB")
    click.echo(
        f"{'test':<8}{'threads':>8}  {'profile':<8}{'tokens/s':>18}{'p50 ms':>9}{'p99 ms':>9}{'of bandwidth':>14}"
    )
    for row in result["rows"]:
        rate = f"{row['tokens_per_second']:.2f} ± {row['spread']:.2f}"
        line = f"{row['test']:<8}{row['threads']:>8}  {row['profile']:<8}{rate:>18}"
        if row["latency_ms"]:
            line += f"{row['latency_ms']['p50']:>9.2f}{row['latency_ms']['p99']:>9.2f}{row['bandwidth_share']:>13.0%}"
        click.echo(line)
    for profile, times in result["load"].items():
        depths = ", ".join(f"{depth}: {ms:.2f}" for depth, ms in result["depth_ms"][profile].items())
        click.echo(
            f"{profile}: load {times['load_s']:.2f} s, first token after {times['first_token_s']:.2f} s; ms a token at depth {depths}"
        )
    for profile, rates in result["chunk_tokens_per_second"].items():
        pieces = ", ".join(f"{chunk}: {rate:.1f}" for chunk, rate in rates.items())
        click.echo(f"{profile}: tokens/s of a prompt in pieces of {pieces}")
    for profile, loads in result["workloads"].items():
        for work, values in loads.items():
            click.echo(f"{profile}, {work}: " + ", ".join(f"{key} {number(value)}" for key, value in values.items()))
    for row in result["rows"]:
        for source, joules in (row["joules_per_token"] or {}).items():
            click.echo(f"{row['test']}, {row['profile']}, {row['threads']} threads: {joules:.3f} J a token ({source})")
    click.echo(f"peak memory {result['peak_rss_bytes'] / 1e6:.0f} MB")


def show_ratios(ratios: Sequence[Ratio]) -> None:
    """A line for each value: A, B, and B / A."""
    width = max(len(ratio.what) for ratio in ratios)
    click.echo(f"{'':<{width}}  {'A':>10}  {'B':>10}  {'B/A':>7}")
    for ratio in ratios:
        quotient = "" if ratio.ratio is None else f"{ratio.ratio:.3f}"
        click.echo(
            f"{ratio.what:<{width}}  {number(ratio.a):>10}  {number(ratio.b):>10}  {quotient:>7}  {ratio.unit}".rstrip()
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the speeds, and the time of a token by depth."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tmexport.files import atomic_write

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = [f"{r['test']}\n{r['profile']}, {r['threads']} thr." for r in result["rows"]]
    rates = [r["tokens_per_second"] for r in result["rows"]]
    left.bar(range(len(rates)), rates, yerr=[r["spread"] for r in result["rows"]], color="#4878a8")
    left.set_xticks(range(len(rates)), labels, fontsize=7)
    left.set(ylabel="tokens / s", title=Path(result["model"]).name)
    for profile, times in result["depth_ms"].items():
        right.plot([int(d) for d in times], list(times.values()), marker="o", label=profile)
    right.set(xlabel="tokens of context", ylabel="ms a token", title="Decoding does not slow down with depth")
    right.set_ylim(bottom=0)
    right.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    with atomic_write(path) as file:
        file.write(image.getvalue())
