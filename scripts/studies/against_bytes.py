"""Low-bit files of one model: bits per byte against bytes, ours in this runtime and llama.cpp's own quantisations in llama.cpp.

    python scripts/studies/against_bytes.py --teacher scripts/demo/teacher --data train.jsonl --held-out heldout.jsonl \
        --also "ternary, trained=runtime_ref/demo/sotu.gguf" --llama-python .lcp/bin/python --out rows.json

A teacher is a full-precision folder of Mamba-1, Mamba-2 or a hybrid. Each of our files is scored by both profiles, `exact` (16-bit
activations) and `fast` (8-bit); methods that read text, with --seeds calibration texts. llama.cpp's are made of the F16 file
by llama_model_quantize without an importance matrix. Documents are cut after --tokens tokens; bytes are those of the tensors.
A table goes to stderr; the last line is one JSON object. OUT keeps what is done.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import click
import torch
from gguf import GGUFReader

from qat.ptq.making import calibration_ids, make
from qat.ptq.transforms import TRANSFORMS
from runtime_ref.model import Model
from runtime_ref.perplexity import end_of_text, read_documents, score_tokens
from runtime_ref.tokenizer import Tokenizer
from scripts.peers.score_everywhere import LLAMA
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.errors import TmexportError
from tmexport.files import atomic_write
from tmexport.gguf.export import plan_export

_PATH = click.Path(path_type=Path, exists=True)
FULL = "F16"


class Way(NamedTuple):
    """A low-bit checkpoint of ours: a key of METHODS, kinds of weights and of the embedding, transformations."""

    method: str
    kind: str
    embedding: str = "int8"
    transforms: tuple[str, ...] = ()

    @property
    def seeded(self) -> bool:
        return self.method == "gptq" or any(TRANSFORMS[name].reads_text for name in self.transforms)


WAYS = {
    "int8 RTN (Q8_0)": Way("rtn", "int8"),
    "int4 RTN (Q4_0)": Way("rtn", "int4"),
    "int4 GPTQ": Way("gptq", "int4"),
    "int4 GPTQ, int4 embedding": Way("gptq", "int4", "int4"),
    "int8 RTN, online Hadamard": Way("rtn", "int8", transforms=("online",)),
    "int4 GPTQ, online Hadamard": Way("gptq", "int4", transforms=("online",)),
    "int4 GPTQ, int4 embedding, online Hadamard": Way("gptq", "int4", "int4", ("online",)),
    "ternary GPTQ, online Hadamard": Way("gptq", "ternary", transforms=("online",)),
    "int4 quamba2": Way("gptq", "int4", transforms=("fold", "sort", "hadamard")),
    "ternary GPTQ": Way("gptq", "ternary"),
}
LLAMA_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10}  # llama.h, enum llama_ftype

_QUANTIZE = """
import ctypes, sys
import llama_cpp
wanted = llama_cpp.llama_model_quantize_default_params()
wanted.nthread, wanted.ftype = 1, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(wanted)))
"""


class Texts(NamedTuple):
    """Tokens of the documents, the token each starts with included, and the bytes of their text."""

    documents: list[list[int]]
    n_bytes: int

    @classmethod
    def of(cls, gguf: Path, path: Path, tokens: int) -> Texts:
        tokenizer = Tokenizer.from_gguf(gguf)
        model = Model.load(gguf, "exact", 1)
        start = end_of_text(model, tokenizer)
        model.close()
        begin = [] if start is None else [start]
        documents = [(begin + tokenizer.encode(document))[: tokens + 1] for document in read_documents(path)]
        documents = [ids for ids in documents if len(ids) > 1]
        return cls(documents, sum(len(tokenizer.decode(ids[1:]).encode()) for ids in documents))

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / self.n_bytes


def ran(gguf: Path, texts: Texts, profile: str) -> float:
    """Bits per byte of a file in this runtime."""
    model = Model.load(gguf, profile, 1)
    nats = sum(score_tokens(model, ids) for ids in texts.documents)
    model.close()
    return texts.bits_per_byte(nats)


def in_llama(python: str, gguf: Path, texts: Texts) -> float:
    """Bits per byte of a file in llama.cpp."""
    return texts.bits_per_byte(float(said([python, "-c", LLAMA, str(gguf), "1"], texts).split("nats")[-1]))


def said(command: list[str], texts: Texts | None = None) -> str:
    """What a Python with llama-cpp-python prints.

    Raises:
        TmexportError: it failed.
    """
    given = None if texts is None else json.dumps(texts.documents)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TmexportError(f"{command[0]} could not run llama.cpp: {last}")
    return done.stdout


def size(gguf: Path) -> int:
    """Bytes of all tensors of a file."""
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(gguf).tensors)


class Study:
    """One teacher. folder: for what is made; ids: calibration tokens by seed."""

    def __init__(self, teacher: Path, texts: Path, tokens: int, llama: str | None, folder: Path) -> None:
        self.teacher, self.llama, self.folder = teacher, llama, folder
        self.full = folder / "full.gguf"
        plan_export(open_checkpoint(teacher), "f16").write(self.full, lambda tensor: None)
        self.texts = Texts.of(self.full, texts, tokens)

    def scored(self, gguf: Path, stock: bool = True) -> dict[str, Any]:
        """Of a file of ours, or that ours reads; stock: llama.cpp runs it too."""
        found = {profile: ran(gguf, self.texts, profile) for profile in ("exact", "fast")}
        if self.llama is not None and stock:
            found["llama.cpp"] = in_llama(self.llama, gguf, self.texts)
        return {"bytes": size(gguf), "bits_per_byte": found}

    def ours(self, way: Way, ids: torch.Tensor, seed: int) -> dict[str, Any]:
        """Made, exported and scored."""
        out = self.folder / "made"
        make(way.method, self.teacher, out, way.kind, None, ids, way.embedding, transforms=way.transforms, seed=seed)
        gguf = self.folder / "made.gguf"
        plan_export(open_checkpoint(out)).write(gguf, lambda tensor: None)
        return self.scored(gguf, stock="online" not in way.transforms)

    def theirs(self, number: int) -> dict[str, Any]:
        """llama.cpp's quantisation, scored by llama.cpp."""
        assert self.llama is not None
        gguf = self.folder / "theirs.gguf"
        said([self.llama, "-c", _QUANTIZE, str(self.full), str(gguf), str(number)])
        return {"bytes": size(gguf), "bits_per_byte": {"llama.cpp": in_llama(self.llama, gguf, self.texts)}}


def table(rows: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> Iterator[str]:
    """Lines of markdown, the largest file first: bits per byte, and percent above the F16 file in the same program."""
    yield "| model | file | MB | seeds | exact (A16) | fast (A8) | llama.cpp |"
    yield "|---|---|---|---|---|---|---|"
    for teacher, files in rows.items():
        whole = files[FULL][0]["bits_per_byte"]
        for name, found in sorted(files.items(), key=lambda item: -item[1][0]["bytes"]):
            cells = []
            for program in ("exact", "fast", "llama.cpp"):
                scores = [row["bits_per_byte"][program] for row in found if program in row["bits_per_byte"]]
                spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
                base = whole["exact"] if program != "llama.cpp" else whole.get("llama.cpp", math.nan)
                cells.append(f"{mean(scores):.4f}{spread} ({mean(scores) / base - 1:+.2%})" if scores else "")
            yield f"| {teacher} | {name} | {found[0]['bytes'] / 1e6:.2f} | {len(found)} | {' | '.join(cells)} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--teacher", required=True, type=_PATH, help="Checkpoint folder.")
@click.option("--data", multiple=True, required=True, type=_PATH, help="Calibration text; repeatable.")
@click.option("--held-out", required=True, type=_PATH, help="Text to score.")
@click.option("--also", multiple=True, metavar="NAME=FILE", help="A GGUF of the same tokenizer in the same table.")
@click.option("--llama-python", help="The Python that has llama-cpp-python; without it, ours alone.")
@click.option("--tokens", default=4096, show_default=True, help="At most so many tokens of a document.")
@click.option("--samples", default=16, show_default=True, help="Calibration sequences of 512 tokens.")
@click.option("--seeds", default=3, show_default=True, help="Calibration texts of a method that reads any.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Results of all teachers, JSON.")
def main(
    teacher: Path, data: tuple[Path, ...], held_out: Path, also: tuple[str, ...], llama_python: str | None,
    tokens: int, samples: int, seeds: int, out: Path,
) -> None:  # fmt: skip
    """Score the low-bit files of TEACHER."""
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(out.read_text()) if out.exists() else {}
    own = rows.setdefault(teacher.name, {})
    wanted = [(FULL, 1), *((name, seeds if way.seeded else 1) for name, way in WAYS.items())]
    others = dict(entry.split("=", 1) for entry in also)
    wanted += [(name, 1) for name in (*others, *(LLAMA_TYPES if llama_python else ()))]
    left = [(name, seed) for name, count in wanted for seed in range(len(own.get(name, ())), count)]
    with tempfile.TemporaryDirectory() as made, progress_bar("files", len(left), keep=True) as bar:
        study = Study(teacher, held_out, tokens, llama_python, Path(made))
        for name, seed in left:
            if name == FULL:
                row = study.scored(study.full)
            elif name in WAYS:
                row = study.ours(
                    WAYS[name], calibration_ids(teacher, list(data), None, samples, 512, seed, Path(made)), seed
                )
            elif name in others:
                row = study.scored(Path(others[name]))
            else:
                row = study.theirs(LLAMA_TYPES[name])
            own.setdefault(name, []).append(row)
            with atomic_write(out) as file:
                file.write(json.dumps(rows).encode())
            bar.advance(1, what=f"{name} {next(iter(row['bits_per_byte'].values())):.4f}")
    click.echo("\n".join(table(rows)), err=True)
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    run_command(main, "scripts/studies/against_bytes.py")
