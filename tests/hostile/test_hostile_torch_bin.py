"""pytorch_model.bin: a stranger's pickle and archive, broken or lying, is refused with one line and never executed."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hostile.builders import dense_arrays, dense_config
from tests.hostile.targets import peak_bytes, read_checkpoint, torch_archive
from tests.hostile.test_hostile_checkpoint import EMBED, refused
from tmexport import torch_pickle
from tmexport.checkpoint import open_checkpoint


def torch_folder(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dense_config()))
    (folder / "pytorch_model.bin").write_bytes(data)
    return folder


def saved(state: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def state_dict() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in dense_arrays().items()}


def test_the_unbroken_torch_archive_is_read(tmp_path):
    folder = torch_folder(tmp_path, saved(state_dict()))
    read_checkpoint(folder)
    checkpoint_ = open_checkpoint(folder)
    assert all(np.array_equal(checkpoint_.dense(name), array) for name, array in dense_arrays().items())


class Payload:
    """Pickles to a call of `function`: arbitrary code, if anything ever unpickles it plainly."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def _executed(path: str) -> int:
    Path(path).write_text("executed")
    return 0


PAYLOADS = {
    "os.system": lambda p: Payload(os.system, f"touch {p}"),
    "exec": lambda p: Payload(exec, f"open({str(p)!r}, 'w')"),
    "eval": lambda p: Payload(eval, f"open({str(p)!r}, 'w')"),
    "open": lambda p: Payload(open, str(p), "w"),
    "a function of ours": lambda p: Payload(_executed, str(p)),
    "pickle in pickle": lambda p: Payload(pickle.loads, pickle.dumps(Payload(os.system, f"touch {p}"))),
    "a torch loader": lambda p: Payload(torch.load, str(p)),
    "a path": lambda p: Payload(Path.touch, p),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("container", ["zip", "plain pickle", "legacy", "hidden in a state dict"])
@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_payload_never_executes(tmp_path, monkeypatch, payload, container, environment):
    if environment:
        monkeypatch.setenv(environment, "1")
    mark = tmp_path / "executed"
    harmful = PAYLOADS[payload](mark)
    data = {
        "zip": lambda: torch_archive(pickle.dumps(harmful, protocol=2), {}),
        "plain pickle": lambda: pickle.dumps(harmful, protocol=2),
        "legacy": lambda: saved({"x": harmful}, _use_new_zipfile_serialization=False),
        "hidden in a state dict": lambda: saved(state_dict() | {"x": harmful}),
    }[container]()
    refused(
        torch_folder(tmp_path / "ckpt", data),
        r"pytorch_model.bin: (is not a torch archive of tensors alone|is not a zip archive)",
    )
    assert not mark.exists()


def test_the_payloads_would_execute_if_they_could(tmp_path):
    mark = tmp_path / "executed"
    for name in set(PAYLOADS) - {"a torch loader"}:
        pickle.loads(pickle.dumps(PAYLOADS[name](mark), protocol=2))
        assert mark.exists(), name
        mark.unlink()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "holds a list; expected a state dict of tensors"),
        ({"x": 3}, "x is a int; expected floats"),
        ({3: torch.zeros(2)}, "holds a tensor named 3; expected text"),
        ({"model": {"x": 3}}, "x is a int; expected floats"),
        ({"model": {}, "state_dict": {}}, "holds the dicts state_dict and model; expected one"),
        ({"weights": {"x": torch.zeros(2)}}, "weights is a dict; expected floats"),
        ({"x": torch.zeros(4, dtype=torch.int64)}, "x is a torch.int64; expected floats"),
        ({"x": torch.zeros(4, dtype=torch.complex64)}, "x is a torch.complex64; expected floats"),
        ({"x": torch.zeros(4, dtype=torch.uint16)}, "x is a torch.uint16; expected floats|is not a torch archive"),
        ({"x": torch.eye(3).to_sparse()}, r"x is sparse; save it again with .to_dense\(\)|is not a torch archive"),
        ({"x": torch.zeros(1).expand(2**19)}, r"x has more values than are stored; save it again with .contiguous\(\)"),
        ({"x": torch.zeros(2)}, "backbone.embeddings.weight is missing"),
    ],
    ids=["list", "int", "key", "nested", "two nested", "unknown nested", "int64", "complex", "uint16", "sparse", "expanded", "other"],
)  # fmt: skip
@pytest.mark.parametrize("old_form", [False, True])
def test_an_archive_of_other_things(tmp_path, state, message, old_form):
    refused(torch_folder(tmp_path, saved(state, _use_new_zipfile_serialization=not old_form)), message)


def test_a_view_that_shows_a_value_too_often_is_refused_before_it_fills_the_memory(tmp_path):
    for old_form in (False, True):
        many = {f"x{i}": torch.zeros(1).expand(2**40) for i in range(8)}
        folder = torch_folder(tmp_path / str(old_form), saved(many, _use_new_zipfile_serialization=not old_form))
        refused(folder, "x0 has more values than are stored")


def test_the_form_before_torch_1_6_truncated_or_lying(tmp_path):
    whole = saved(state_dict(), _use_new_zipfile_serialization=False)
    read_checkpoint(torch_folder(tmp_path, whole))
    for end in [*range(0, 200, 20), *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        refused(torch_folder(tmp_path, whole[:end]), "is not a zip archive, nor|is not a torch archive")
    for lie in (
        b"\x8a\x06" + (2**40).to_bytes(6, "little"),
        b"J\xff\xff\xff\xff",
    ):  # BININT2 1024: the embedding's storage
        assert b"M\x00\x04" in whole
        refused(torch_folder(tmp_path, whole.replace(b"M\x00\x04", lie, 1)), "is not a torch archive")


def test_a_tar_archive_is_not_unpickled(tmp_path):
    """Its first member's name may start as the form before 1.6 does."""
    magic = saved({}, _use_new_zipfile_serialization=False)[:15]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(magic.decode("latin-1")), io.BytesIO())
    assert out.getvalue().startswith(magic)
    refused(torch_folder(tmp_path, out.getvalue()), "is not a zip archive, nor torch's form before 1.6")


def test_a_torch_archive_truncated_anywhere(tmp_path):
    whole = saved(state_dict())
    for end in [*range(0, 200, 40), *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        refused(torch_folder(tmp_path, whole[:end]), "is not a zip archive|is not a torch archive|damaged|truncated")


def _rezip(data: bytes, change) -> bytes:
    """The same archive, each record as `change(name, content)` returns it: (content, compression)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content, compression = change(name, source.read(name))
            target.writestr(name, content, compress_type=compression)
    return out.getvalue()


def test_a_compressed_record_is_refused_before_it_is_expanded(tmp_path):
    bomb = _rezip(
        saved(state_dict()),
        lambda n, c: (bytes(200_000_000), zipfile.ZIP_DEFLATED) if n.endswith("data.pkl") else (c, 0),
    )
    assert len(bomb) < 1_000_000
    folder = torch_folder(tmp_path, bomb)
    assert (
        peak_bytes(lambda: refused(folder, r"data.pkl is compressed; expected an archive as torch.save writes it"))
        < 2**20
    )


def test_a_pickle_too_long_for_its_purpose(tmp_path):
    refused(
        torch_folder(tmp_path, torch_archive(bytes(2**22 + 1), {})),
        r"data.pkl has 4194305 bytes; expected at most 4194304",
    )


def test_a_storage_shorter_than_the_pickle_says(tmp_path):
    short = _rezip(saved(state_dict()), lambda n, c: (c[:-4] if n.endswith("/data/0") else c, 0))
    refused(
        torch_folder(tmp_path, short),
        rf"{EMBED} does not lie in one record, from byte \d+ to \d+; the archive is damaged",
    )


def test_a_tensor_outside_its_storage(tmp_path):
    """torch.save's pickle with the embedding's shape (16, 64) changed to (16, 65), and with its offset 0 changed to 200."""
    for change in ((b"K\x10K@\x86", b"K\x10KA\x86"), (b"QK\x00K\x10K@", b"QK\xc8K\x10K@")):
        moved = _rezip(
            saved(state_dict()), lambda n, c, pair=change: (c.replace(*pair, 1) if n.endswith("data.pkl") else c, 0)
        )
        message = "not a torch archive|not stored contiguously|does not lie in one record"
        refused(torch_folder(tmp_path, moved), rf"{message}")


def with_storage_size(number: bytes) -> bytes:
    """torch.save's archive, zipped again; in its pickle, the size of the embedding's storage is written as `number`."""

    def change(name, content):
        assert content.count(EMBEDDING_SIZE) == 1 or not name.endswith("data.pkl")
        return content.replace(EMBEDDING_SIZE, number) if name.endswith("data.pkl") else content, 0

    return _rezip(saved(state_dict()), change)


EMBEDDING_SIZE = b"M\x00\x04"  # BININT2 1024: 16 * 64 values


def test_an_archive_that_another_program_zipped(tmp_path):
    """Its records do not lie at torch's multiples of 64 bytes; torch.load reads it, though its own table of offsets is wrong."""
    folder = torch_folder(tmp_path, with_storage_size(EMBEDDING_SIZE))
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)
    checkpoint_ = open_checkpoint(folder)
    assert all(np.array_equal(checkpoint_.dense(name), loaded[name]) for name in dense_arrays())


@pytest.mark.parametrize(
    "number", [b"J\xff\xff\xff\xff", b"\x8a\x08" + (2**50).to_bytes(8, "little"), b"K\1"], ids=["-1", "2**50", "1"]
)
def test_a_storage_of_absurd_size_is_not_allocated(tmp_path, number):
    folder = torch_folder(tmp_path, with_storage_size(number))
    message = (
        f"pytorch_model.bin: {EMBED} lies in a storage of -?\\d+ bytes whose record has 4096; the archive is damaged"
    )
    assert peak_bytes(lambda: refused(folder, message)) < 2**20


def test_numbers_in_the_other_byte_order_are_refused(tmp_path):
    """A big-endian machine's torch.save: read as they lie, every weight would be another number."""
    other = _rezip(saved(state_dict()), lambda n, c: (b"big" if n.endswith("byteorder") else c, 0))
    refused(torch_folder(tmp_path, other), "holds numbers in big-endian order; save it again")


def test_a_record_that_is_there_twice(tmp_path):
    data = io.BytesIO(saved(state_dict()))
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(n for n in archive.namelist() if n.endswith("data/0")), bytes(4096))
    refused(torch_folder(tmp_path, data.getvalue()), "holds two records named data/0; the archive is damaged")


def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    refused(torch_folder(tmp_path, (tmp_path / "m.pt").read_bytes()), "is a TorchScript archive")


def test_an_index_of_the_memo_allocates_nothing(tmp_path):
    """LONG_BINPUT: the unpickler in C makes a table of twice that many pointers."""
    pickled = b"\x80\x02}r\xff\xff\xff\x7f."
    folder = torch_folder(tmp_path, torch_archive(pickled, {}))
    assert peak_bytes(lambda: refused(folder, f"{EMBED} is missing")) < 2**20


ON_A_FUNCTION = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n%b."


@pytest.mark.parametrize(
    "attributes",
    [b"}X\1\0\0\0xK\1sb", b"N}X\x0c\0\0\0__defaults__K\1K\2\x86s\x86b", b"N}X\x08\0\0\0__code__Ns\x86b"],
    ids=["x", "defaults", "code"],
)
def test_a_pickle_sets_nothing_on_our_functions(tmp_path, attributes):
    before = dict(vars(torch_pickle._tensor)), torch_pickle._tensor.__defaults__, torch_pickle._tensor.__code__
    refused(torch_folder(tmp_path, torch_archive(ON_A_FUNCTION % attributes, {})), "holds a function; expected a state")
    assert (
        dict(vars(torch_pickle._tensor)),
        torch_pickle._tensor.__defaults__,
        torch_pickle._tensor.__code__,
    ) == before


@pytest.mark.parametrize(
    "name", ["tmexport.torch_pickle\nread_pickle", "builtins\ngetattr", "torch.hub\nload", "os\nsystem"]
)
@pytest.mark.parametrize("opcode", [b"c%b\n", b"\x80\x04X%b%b"], ids=["GLOBAL", "STACK_GLOBAL"])
def test_no_other_name_is_looked_up(tmp_path, name, opcode):
    words = [b"X" + len(word).to_bytes(4, "little") + word.encode() for word in name.split("\n")]
    pickled = b"".join([*words, b"\x93."]) if opcode == "STACK_GLOBAL" else b"c" + name.encode() + b"\n."
    pickled = b"\x80\x04" + pickled
    refused(torch_folder(tmp_path, torch_archive(pickled, {})), f"it names {name.replace(chr(10), '.')}")
