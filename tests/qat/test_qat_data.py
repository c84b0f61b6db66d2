"""Reading, tokenising and batching text."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from qat.data import Batches, find_files, read_documents, tokenize_files
from qat.tokenizer import END_OF_TEXT
from tmexport.errors import TextError, TokenizerError


def test_tokenizer_covers_every_byte(tokenizer_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.get_vocab_size() == 300
    for text in ("Ünïcödé — 漢字 \x00\x7f 🙂", " leading and trailing  \n\n\t", "don't we'll"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_stream_holds_every_document(corpus, tokenizer_path, tmp_path):
    stream = tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert stream.documents == len(texts) == 40
    assert stream.text_bytes == sum(len(text.encode()) for text in texts)
    starts = np.flatnonzero(stream.tokens == 0)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    ends = [*starts[1:], len(stream.tokens)]
    assert [tokenizer.decode(stream.tokens[a + 1 : b].tolist()) for a, b in zip(starts, ends, strict=True)] == texts


def test_tokenised_once(corpus, tokenizer_path, tmp_path):
    tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path)
    (data,) = tmp_path.glob("*.bin")
    before = data.stat().st_mtime_ns
    tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path)
    assert data.stat().st_mtime_ns == before
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely.")
    tokenize_files([corpus, other], tokenizer_path, 300, 0, tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_formats_agree(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "year": 1}\n')
    (tmp_path / "notes.md").write_text("not text for training")
    files = find_files([tmp_path])
    assert [f.name for f in files] == ["a.txt", "b.jsonl"]
    assert [text for f in files for text in read_documents(f)] == ["one", "two", "three"]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_parquet_and_data_sets_give_the_tokens_of_the_lines(corpus, tokenizer_path, tmp_path):
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    rows = write_parquet(tmp_path / "rows.parquet", year=list(range(40)), text=texts)
    for name in ("lines", "columns"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines" / "train.jsonl").write_bytes(corpus.read_bytes())
    write_parquet(tmp_path / "columns" / "test.parquet", text=texts)
    wanted = tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path / "cache")
    sources = [rows, f"hf:{tmp_path / 'lines'}", f"hf:{tmp_path / 'columns'}::test"]
    for source in sources:
        stream = tokenize_files([Path(source)], tokenizer_path, 300, 0, tmp_path / "cache")
        assert np.array_equal(stream.tokens, wanted.tokens), source
        assert (stream.documents, stream.text_bytes, stream.digest) == (40, wanted.text_bytes, wanted.digest)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 4


def test_limit_ends_with_the_document_that_reaches_it(corpus, tokenizer_path, tmp_path):
    whole = tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path)
    starts = np.flatnonzero(whole.tokens == 0)
    for limit, documents in ((1, 1), (int(starts[3]), 3), (int(starts[3]) + 1, 4), (10**9, 40)):
        stream = tokenize_files([corpus], tokenizer_path, 300, 0, tmp_path, limit)
        assert stream.documents == documents, limit
        assert np.array_equal(stream.tokens, whole.tokens[: len(stream.tokens)])
    assert len(stream.tokens) == len(whole.tokens)


def test_data_sets_that_cannot_be_read(corpus, tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", title=["no text here"])
    with pytest.raises(TextError, match=r"has the columns \['title'\]; expected one named \"text\""):
        list(read_documents(tmp_path / "a.parquet"))
    with pytest.raises(TextError, match=r"has the columns \['title'\]; expected a string in one named \"text\""):
        list(read_documents(Path(f"hf:{tmp_path}")))
    for name in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(TextError, match="is not the name of a data set; expected hf:NAME"):
            list(read_documents(Path(name)))
    with pytest.raises(TextError, match="cannot be read as a data set: ") as caught:
        list(read_documents(Path(f"hf:{tmp_path}::nosuchsplit")))
    assert "\n" not in str(caught.value)
    for module, path in (("datasets", Path("hf:some/name")), ("pyarrow.parquet", tmp_path / "a.parquet")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(TextError, match=r"install it with: pip install 'tmexport\[data\]'"):
            list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "no"}\n', 'line 2 has no string "text"'),
        ("a.jsonl", b'{"text": "ok"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b'["text"]\n', 'line 1 has no string "text"'),
        ("a.jsonl", b"[" * 100000, "line 1 is not JSON"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.csv", b"x", "ends in '.csv'"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    cache = tmp_path / "cache"
    with pytest.raises(TextError, match=message) as caught:
        tokenize_files([path], tokenizer_path, 300, 0, cache)
    assert str(path) in str(caught.value)
    assert not list(cache.glob("*"))


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(TextError, match="no such file"):
        find_files([tmp_path / "nothing.txt"])
    with pytest.raises(TextError, match="holds no text"):
        find_files([tmp_path])


def test_tokenizer_larger_than_the_model(corpus, tokenizer_path, tmp_path):
    with pytest.raises(TokenizerError, match="up to 299, but the model has 256 embeddings"):
        tokenize_files([corpus], tokenizer_path, 256, 0, tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer.json"):
        tokenize_files([corpus], tmp_path / "broken.json", 256, 0, tmp_path)


def test_an_epoch_visits_every_window_once():
    tokens = np.arange(1003, dtype=np.uint16)
    batches = Batches(tokens, seq_len=10, batch_size=3, seed=5)
    assert batches.windows == 99
    for epoch in (0, 1):
        rows = np.concatenate([batches(step) for step in range(33 * epoch, 33 * (epoch + 1))])
        assert rows.shape == (99, 11)
        assert (np.diff(rows, axis=1) == 1).all()
        starts = np.sort(rows[:, 0])
        assert (np.diff(starts) == 10).all()
    assert not np.array_equal(batches(0), batches(33))
    assert not np.array_equal(batches(0), Batches(tokens, 10, 3, 6)(0))


def test_a_batch_depends_on_seed_and_step_only():
    tokens = np.arange(500, dtype=np.uint16)
    walked = Batches(tokens, 7, 4, 1)
    for step in range(40):
        expected = walked(step)
    assert np.array_equal(Batches(tokens, 7, 4, 1)(39), expected)


def test_too_little_text():
    with pytest.raises(TextError, match="one sequence needs 11"):
        Batches(np.zeros(10, np.uint16), 10, 1, 0)
