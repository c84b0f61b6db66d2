"""What the demo runs: the commands, their files, and how large everything is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.demo.report import (
    CONTROL,
    MODELS,
    SAMPLING,
    said_bench,
    said_content,
    said_export,
    said_llamacpp,
    said_proof,
    said_score,
    said_tokens,
)
from scripts.demo.steps import Step

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "qat" / "recipes" / "demo-cpu.toml"
SHIPPED_TEACHER = Path(__file__).parent / "teacher"  # trained once; its recipe and metrics lie beside it
PROMPT = "Fellow citizens, the state of the Union is"


@dataclass(frozen=True)
class Scale:
    """How large the demo is; tiny exists for the tests and takes seconds.

    speeches: of the corpus, or None for all. teacher, student: further options of `qat.train`. tokens: to generate.
    runs: timed runs of llama.cpp.
    """

    speeches: int | None = None
    teacher: str = ""
    student: str = ""
    tokens: int = 128
    runs: int = 5


_TINY = "--seq-len 64 --batch-size 2 --eval-tokens 2048"
SCALES = {
    "demo": Scale(),
    "tiny": Scale(20, f"--d-model 256 --n-layer 1 --vocab-size 320 --steps 6 {_TINY}", f"--steps 4 {_TINY}", 8, 1),
}


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the output folder; from_scratch: the teacher is trained there, not taken from the repository."""

    out: Path
    from_scratch: bool = False

    @property
    def train(self) -> Path:
        return self.out / "data" / "train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.out / "data" / "heldout.jsonl"

    @property
    def records(self) -> Path:
        return self.out / "steps"

    def checkpoint(self, model: str) -> Path:
        return self.out / model

    def gguf(self, model: str) -> Path:
        return self.out / f"{model}.gguf"


def words(*parts: str | Path) -> tuple[str, ...]:
    """A command: strings are split at blanks, paths are kept whole."""
    return tuple(word for part in parts for word in ([str(part)] if isinstance(part, Path) else part.split()))


def sections(layout: Layout, scale: Scale) -> dict[str, list[Step]]:
    """The steps in order, under the titles of the demo's sections."""
    train, held_out, gguf = layout.train, layout.held_out, layout.gguf
    folder = {model: layout.checkpoint(model) for model in MODELS}
    teacher = folder["teacher"]
    corpus = words("--data", train, "--held-out", held_out)

    def asking(
        name: str,
        command: tuple[str, ...],
        inputs: tuple[Path, ...],
        summary: Callable[[dict[str, Any]], str],
        outputs: tuple[Path, ...] = (),
    ) -> Step:
        printed = layout.records / f"{name}.out.json"
        return Step(name, command, inputs, (*outputs, printed), printed, summary)

    train_teacher = words(
        "python -m qat.train --from-scratch --recipe demo-cpu", *map(Path, corpus), "--out", teacher, scale.teacher
    )
    train_student = words(
        "python -m qat.train --teacher",
        teacher,
        "--recipe demo-cpu",
        *map(Path, corpus),
        "--out",
        folder["student"],
        scale.student,
    )
    train_control = words(
        "python -m qat.train --teacher", teacher, "--weights dense --lr 1e-4 --recipe demo-cpu", *map(Path, corpus), "--out",
        layout.checkpoint(CONTROL), scale.student,
    )  # fmt: skip
    data = (train, held_out, RECIPE)
    llamacpp = Path(os.path.relpath(ROOT / "scripts" / "peers" / "run_llamacpp.py"))
    prompt, ask = Path(PROMPT), f"-n {scale.tokens} --threads 1"  # a Path, so that it stays one word
    trained = {
        "Train a small Mamba-2 from scratch: the teacher": [
            Step("train-teacher", train_teacher, data, (teacher,), resumable=True),
        ],
    }
    return (trained if layout.from_scratch else {}) | {
        "Make it ternary without training: rounding, the baseline": [
            Step(
                "ptq-rtn",
                words("python -m qat.ptq rtn --teacher", teacher, "--out", folder["rtn"]),
                (teacher,),
                (folder["rtn"],),
            ),
        ],
        "Make it ternary with training: QAT, distilled from the teacher": [
            Step("train-student", train_student, (*data, teacher), (folder["student"],), resumable=True),
        ],
        "Train the teacher on for as long, in full precision: the control": [
            Step("train-control", train_control, (*data, teacher), (layout.checkpoint(CONTROL),), resumable=True),
        ],
        "Measure the four on speeches that none of them has seen": [
            asking(
                f"evaluate-{m}",
                words("python -m qat.evaluate", layout.checkpoint(m), "--data", held_out, "--json"),
                (layout.checkpoint(m), held_out),
                said_score,
            )
            for m in (*MODELS, CONTROL)
        ],
        "Export to GGUF, the ternary ones in the smallest type that is exact": [
            asking(
                f"export-{m}",
                words("tmexport gguf", folder[m], gguf(m), "--type", "f16" if m == "teacher" else "auto", "--json"),
                (folder[m],),
                said_export,
                (gguf(m),),
            )
            for m in MODELS
        ],
        "Prove that the files hold what was trained": [
            step
            for m in MODELS
            for step in (
                asking(
                    f"verify-{m}",
                    words("tmexport verify", folder[m], gguf(m), "--json"),
                    (folder[m], gguf(m)),
                    said_proof,
                ),
                asking(f"inspect-{m}", words("tmexport inspect", gguf(m), "--json"), (gguf(m),), said_content),
            )
        ],
        "Measure the file to ship once more, in the runtime that will serve it": [
            asking(
                "perplexity-student",
                words("python -m runtime_ref.perplexity", gguf("student"), held_out, "--json"),
                (gguf("student"), held_out),
                said_score,
            )
        ],
        "Run the files: runtime_ref, and a stock llama.cpp": [
            asking(
                "sample-student",
                words("python -m runtime_ref.generate", gguf("student"), "--prompt", prompt, ask, SAMPLING, "--json"),
                (gguf("student"),),
                said_tokens,
            )
        ]
        + [
            step
            for m in MODELS
            for step in (
                asking(
                    f"generate-{m}",
                    words("python -m runtime_ref.generate", gguf(m), "--prompt", prompt, ask, "--profile fast --json"),
                    (gguf(m),),
                    said_tokens,
                ),
                asking(
                    f"bench-{m}",
                    words(
                        "python -m runtime_ref.bench",
                        gguf(m),
                        f"-n {scale.tokens} -t 1 -r {scale.runs} --profile fast --depth 0 --json",
                    ),
                    (gguf(m),),
                    said_bench,
                ),
                asking(
                    f"llamacpp-{m}",
                    words("python", llamacpp, gguf(m), "--prompt", prompt, ask, f"--runs {scale.runs}"),
                    (gguf(m),),
                    said_llamacpp,
                ),
            )
        ],
    }
