"""What the demo shows at its end: the texts, the table, the curves, and the list of files."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from scripts.demo.steps import Records, Step

LABELS = {"teacher": "teacher", "rtn": "ternary, rounded", "student": "ternary, QAT"}
MODELS = tuple(LABELS)
CONTROL, CONTROL_LABEL = "control", "teacher, longer"  # in full precision, as long as the student

SAMPLING = "--temperature 0.8 --top-p 0.95 --seed 1"

# What lies in the output folder, first match wins (* also matches a slash). A name that ends in / stands for all its files.
PHRASES = (
    ("data/train.jsonl", "speeches to train on"),
    ("data/heldout.jsonl", "speeches that are never trained on"),
    ("teacher.gguf", "the teacher for llama.cpp and runtime_ref, 16-bit weights"),
    ("rtn.gguf", "the rounded model, ternary"),
    ("control/model.safetensors", "weights of the teacher that was trained on, fp32"),
    ("student.gguf", "the trained ternary model: the file to ship"),
    ("curves.png", "bits per byte and zero ratio over the training"),
    ("results.json", "every number above, and the texts"),
    ("teacher/model.safetensors", "the teacher's weights"),
    ("*/model.safetensors", "weights: ternary codes and scales, the rest in fp32"),
    ("*/config.json", "dimensions, in Hugging Face's form"),
    ("*/tokenizer.json", "the tokenizer"),
    ("*/recipe.toml", "every setting of the training"),
    ("*/metrics.jsonl", "loss, speed, zero ratios: a line a step"),
    ("*/curves.png", "the training's curves"),
    ("*/checkpoints/", "what --resume needs; may be deleted"),
    ("*/cache/", "the speeches as token numbers; may be deleted"),
    ("steps/", "what each command printed, and what lets the next run reuse it"),
)


def said_score(printed: dict[str, Any]) -> str:
    return f"{printed['bits_per_byte']:.4f} bits per byte, perplexity {printed['perplexity']:.2f}"


def said_export(printed: dict[str, Any]) -> str:
    ratio = printed["ratio_to_fp16"]
    smaller = f", {ratio:.2f} x smaller than fp16" if ratio > 1 else ""
    return f"{printed['type']}, {printed['bytes'] / 1e6:.2f} MB{smaller}"


def said_proof(printed: dict[str, Any]) -> str:
    codes = (
        f"{printed['codes']:,} codes and {printed['scales']:,} scales equal bit for bit, " if printed["codes"] else ""
    )
    return f"{codes}{printed['other_tensors']} other tensors within their type's rounding"


def said_content(printed: dict[str, Any]) -> str:
    zeros = "" if printed["zero_ratio"] is None else f", zero ratio {printed['zero_ratio']:.3f}"
    return f"{printed['parameters']:,} parameters{zeros}"


def said_tokens(printed: dict[str, Any]) -> str:
    return f"{len(printed['tokens'])} tokens"


def said_bench(printed: dict[str, Any]) -> str:
    return ", ".join(f"{row['test']}: {row['tokens_per_second']:,.0f} tokens/s" for row in printed["rows"])


def said_llamacpp(printed: dict[str, Any]) -> str:
    return f"{len(printed['tokens'])} tokens, {printed['tokens_per_second']:,.0f} tokens/s"


def results_of(steps: dict[str, Step], records: Records, prompt: str) -> dict[str, Any]:
    """All that was measured, read from what the commands printed.

    Sizes are in bytes, speeds in tokens a second with one thread. recovery_percent is the share of the distance in bits
    per byte between rounding and the teacher that training made good.
    """
    models = {}
    for name, label in LABELS.items():
        score, exported, seen, proof, ours, speed, stock = (
            steps[f"{what}-{name}"].printed
            for what in ("evaluate", "export", "inspect", "verify", "generate", "bench", "llamacpp")
        )
        (decoding,) = (row for row in speed["rows"] if row["test"].startswith("tg"))
        models[name] = {
            "label": label,
            "bits_per_byte": score["bits_per_byte"],
            "perplexity": score["perplexity"],
            "parameters": seen["parameters"],
            "zero_ratio": seen["zero_ratio"],
            "type": exported["type"],
            "gguf_bytes": exported["bytes"],
            "verified_codes": proof["codes"],
            "verified_scales": proof["scales"],
            "runtime_ref": {
                "text": ours["text"],
                "tokens": ours["tokens"],
                "tokens_per_second": decoding["tokens_per_second"],
            },
            "llama_cpp": {key: stock[key] for key in ("text", "tokens", "margins", "tokens_per_second")},
        }
    models["student"]["runtime_ref"]["bits_per_byte"] = steps["perplexity-student"].printed["bits_per_byte"]
    teacher, rtn, student = (models[name]["bits_per_byte"] for name in ("teacher", "rtn", "student"))
    recovery = 100.0 * (rtn - student) / (rtn - teacher) if rtn > teacher else None
    control = steps[f"evaluate-{CONTROL}"].printed["bits_per_byte"]
    seconds = {name: round(records.seconds(name), 2) for name in steps}
    sample = steps["sample-student"].printed["text"]
    found = {"prompt": prompt, "models": models, CONTROL: control, "sample": sample}
    return found | {"recovery_percent": recovery, "seconds": seconds}


def agreement(results: dict[str, Any]) -> int:
    """How many of the first tokens runtime_ref and llama.cpp agree on, for the student."""
    ours, stock = (results["models"]["student"][runtime]["tokens"] for runtime in ("runtime_ref", "llama_cpp"))
    pairs = list(zip(ours, stock, strict=False))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))


def comparison(results: dict[str, Any]) -> Table:
    """The student's continuation in both runtimes, side by side; what differs is marked."""
    view = Table(
        box=box.ROUNDED, title="The same file, the same prompt, the most probable token each time", expand=True
    )
    texts = [results["models"]["student"][runtime]["text"] for runtime in ("runtime_ref", "llama_cpp")]
    same = _common_prefix(*texts)
    cells = []
    for name, text in zip(("runtime_ref (profile fast)", "stock llama.cpp"), texts, strict=True):
        view.add_column(name, ratio=1)
        cells.append(Text.assemble((results["prompt"], "dim"), text[:same], (text[same:], "yellow")))
    view.add_row(*cells)
    return view


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def first_difference(results: dict[str, Any]) -> str:
    """One line: whether the two continuations are the same, and where not."""
    student = results["models"]["student"]
    ours, stock = student["runtime_ref"], student["llama_cpp"]
    total, same = len(ours["tokens"]), agreement(results)
    if same == total == len(stock["tokens"]):
        return f"All {total} tokens are the same."
    margin = stock["margins"][same] if same < len(stock["margins"]) else None
    why = "" if margin is None else f" (llama.cpp's two best were {margin:.4f} apart in log probability)"
    return f"The first {same} of {total} tokens are the same; the next one differs{why}, and so all that follows."


def sample_line(results: dict[str, Any]) -> str:
    """The student's continuation with a temperature: the most probable token each time repeats itself sooner or later."""
    return f"The same file with {SAMPLING}:\n{results['prompt']}{results['sample']}"


def proof_of_the_file(results: dict[str, Any]) -> str:
    """One line: the shipped file's own score beside the trained model's."""
    student = results["models"]["student"]
    return (
        f"student.gguf itself, measured in runtime_ref: {student['runtime_ref']['bits_per_byte']:.4f} bits per byte; "
        f"as it was trained, in PyTorch: {student['bits_per_byte']:.4f}."
    )


def recovery_line(results: dict[str, Any]) -> str:
    """What training made good of what rounding lost, in words."""
    recovery = results["recovery_percent"]
    if recovery is None:
        return "rounding lost nothing here"
    if recovery > 100:
        return f"QAT made good all that rounding lost, and learned beyond the teacher ({recovery:.0f} %)"
    return f"QAT made good {recovery:.1f} % of what rounding lost"


def table(results: dict[str, Any]) -> Table:
    """The three models, and the control's score, in a table of at most 80 columns."""
    view = Table(
        box=box.ROUNDED,
        title="Held-out speeches, file, and speed with one thread",
        caption=recovery_line(results),
        caption_style="bold green",
    )
    columns: tuple[tuple[str, JustifyMethod], ...] = (
        ("model", "left"),
        ("bits per\nbyte", "right"),
        ("zero\nratio", "right"),
        ("type", "left"),
        ("file\nMB", "right"),
        ("runtime_ref\ntokens/s", "right"),
        ("llama.cpp\ntokens/s", "right"),
    )
    for name, justify in columns:
        view.add_column(name, justify=justify, no_wrap=True)
    for model in results["models"].values():
        view.add_row(
            model["label"],
            f"{model['bits_per_byte']:.3f}",
            "" if model["zero_ratio"] is None else f"{model['zero_ratio']:.3f}",
            model["type"],
            f"{model['gguf_bytes'] / 1e6:.2f}",
            f"{model['runtime_ref']['tokens_per_second']:,.0f}",
            f"{model['llama_cpp']['tokens_per_second']:,.0f}",
        )
    view.add_row(CONTROL_LABEL, f"{results[CONTROL]:.3f}")
    return view


def phrase_for(name: str) -> str:
    """What a file of the output folder, or a folder (its name ends in /), is; "" if nothing is known about it."""
    return next((phrase for pattern, phrase in PHRASES if fnmatch.fnmatch(name, pattern)), "")


def closing_list(out: Path) -> list[str]:
    """A line for every file in the output folder; folders that PHRASES knows as a whole are one line."""
    sizes: dict[str, list[int]] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        relative = path.relative_to(out)
        folder = f"{relative.parent.as_posix()}/"
        name = folder if phrase_for(folder) else relative.as_posix()
        sizes.setdefault(name, []).append(path.stat().st_size)
    width = max(map(len, sizes))
    return [f"{name:<{width}}  {_size(sum(found)):>8}  {phrase_for(name)}" for name, found in sizes.items()]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"
