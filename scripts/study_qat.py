"""The study behind docs/training.md: every variant of the recipe, several seeds, one table.

    python scripts/study_qat.py --teacher out/teacher --data train.jsonl --held-out heldout.jsonl --out study --seeds 3

Runs `qat.train` for every variant and seed with the same number of tokens, one after another; a second start goes on where
the first stopped. Writes OUT/table.md, OUT/zero_ratio.png (zero ratio over time of every variant) and, last on stdout, one
JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import click

from qat.evaluate import evaluate
from qat.ptq import round_to_nearest
from qat.recipe import load_recipe
from qat.train import train

VARIANTS: dict[str, dict[str, float | int | bool]] = {
    "QAT 0.5/0.5": {},
    "CE only": {"kd_weight": 0.0},
    "KD only": {"kd_weight": 1.0},
    "group 128": {"group_size": 128},
    "group 64": {"group_size": 64},
    "learned scale": {"learned_scale": True, "allow_collapse": True},
    "learned scale, 10 x learning rate": {"learned_scale": True, "allow_collapse": True, "lr": 1e-2},
    "20 steps of alignment first": {"align_steps": 20},
}
_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--teacher", required=True, type=_PATH, help="checkpoint folder")
@click.option("--data", multiple=True, required=True, type=_PATH, help="training text; repeatable")
@click.option("--held-out", multiple=True, required=True, type=_PATH, help="text to score; repeatable")
@click.option("--out", required=True, type=_PATH, help="folder for all runs")
@click.option("--steps", type=int, help="instead of the recipe's")
@click.option("--seeds", default=3, show_default=True, help="runs of every variant")
@click.option("--only", multiple=True, help="name of a variant; repeatable [all]")
@click.option("--threads", default=2, show_default=True, help="CPU threads")
def main(
    teacher: Path,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    out: Path,
    steps: int | None,
    seeds: int,
    only: tuple[str, ...],
    threads: int,
) -> None:
    """Run everything that is not there yet, then make the table."""
    scores: dict[str, list[float]] = {"teacher": [evaluate(teacher, list(held_out)).bits_per_byte]}
    for group_size in (256, 128, 64):
        folder = out / f"rtn-{group_size}"
        round_to_nearest(teacher, folder, group_size)
        scores[f"round to nearest, group {group_size}"] = [evaluate(folder, list(held_out)).bits_per_byte]
    zeros: dict[str, list[tuple[int, float]]] = {}
    for name, changes in VARIANTS.items():
        if only and name not in only:
            continue
        for seed in range(seeds):
            flags = {"steps": steps, "seed": seed, "threads": threads, "log_every": 5, **changes}
            recipe = load_recipe("demo-cpu", "student", flags)
            folder = out / f"{name.replace(' ', '-').replace('/', '-').replace(',', '')}-{seed}"
            train(recipe, list(data), folder, teacher, resume=True, cache=out / "cache")
            scores.setdefault(name, []).append(evaluate(folder, list(held_out)).bits_per_byte)
            if seed == 0:
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                zeros[name] = [(row["tokens"], row["zero_ratio"]) for row in rows if "zero_ratio" in row]
    table = make_table(scores, zeros)
    (out / "table.md").write_text(table)
    draw(zeros, out / "zero_ratio.png")
    click.echo(table)
    click.echo(
        json.dumps({"bits_per_byte": scores, "last_zero_ratio": {name: rows[-1][1] for name, rows in zeros.items()}})
    )


def make_table(scores: dict[str, list[float]], zeros: dict[str, list[tuple[int, float]]]) -> str:
    """A Markdown table: mean and spread over the seeds, recovery of the distance from rounding to the teacher."""
    top, bottom = scores["round to nearest, group 256"][0], scores["teacher"][0]
    lines = [
        "| variant | bits per byte (mean, standard deviation) | recovery | zero ratio at the end |",
        "|---|---|---|---|",
    ]
    for name, values in scores.items():
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        last = f"{zeros[name][-1][1]:.1%}" if name in zeros else ""
        lines.append(f"| {name} | {mean(values):.4f}{spread} | {(top - mean(values)) / (top - bottom):.0%} | {last} |")
    return "\n".join(lines) + "\n"


def draw(zeros: dict[str, list[tuple[int, float]]], out: Path) -> None:
    """Zero ratio over the tokens, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in zeros.items():
        axis.plot(*zip(*rows, strict=True), label=name)
    axis.set(title="zero ratio, mean over the projections (first seed)", xlabel="tokens", ylim=(0, 1))
    axis.legend(fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
