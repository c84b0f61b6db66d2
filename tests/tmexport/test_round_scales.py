"""Codes times scales that are no fp16 numbers: recognised, refused with the error of rounding them, rounded when asked to."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from tests.models import SMALL, random_tensors, train_tokenizer
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli.gguf import gguf
from tmexport.cli.onnx import onnx
from tmexport.cli.verify import verify
from tmexport.cli.web import web
from tmexport.errors import NotTernaryError, ScaleError
from tmexport.gguf.reader import open_gguf
from tmexport.types import decode_codes

SCALE = np.float32(0.0213456789)  # fp16 has 0.021347046
NEAREST = np.float16(SCALE)
ERROR = float(np.float64(NEAREST) / np.float64(SCALE) - 1)


def _folder(tmp_path, scale=SCALE):
    rng = np.random.default_rng(3)
    tensors, codes = random_tensors(SMALL), {}
    for name in (n for n in tensors if n.endswith("_proj.weight")):
        codes[name] = rng.integers(-1, 2, tensors[name].shape).astype(np.int8)
        tensors[name] = codes[name] * np.float32(scale)
    write_checkpoint(tmp_path / "ckpt", SMALL, tensors, train_tokenizer(tmp_path / "tokenizer.json"))
    return tmp_path / "ckpt", codes


def _run(command, *args):
    result = CliRunner().invoke(command, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_it_is_refused_with_the_error_of_rounding(tmp_path):
    folder, _ = _folder(tmp_path)
    for command, name in ((gguf, "a.gguf"), (onnx, "a.onnx"), (web, "site")):
        assert any("--round-scales" in option.opts for option in command.params)
        with pytest.raises(ScaleError, match=rf"--round-scales rounds them \(largest relative error {ERROR:.1e}\)"):
            _run(command, folder, tmp_path / name)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("flags", [["--round-scales"], ["--ptq", "rtn"]], ids=" ".join)
def test_codes_stay_and_scales_are_the_nearest_fp16(tmp_path, flags):
    folder, codes = _folder(tmp_path)
    result = _run(gguf, folder, tmp_path / "a.gguf", *flags)
    assert "warning" in result.stderr
    if flags == ["--round-scales"]:
        assert f"{ERROR:.1e}" in result.stderr
    file = open_gguf(tmp_path / "a.gguf")
    name = "backbone.layers.0.mixer.in_proj.weight"
    info = file.tensors["blk.0.ssm_in.weight"]
    found, scales = decode_codes(file.blocks("blk.0.ssm_in.weight"), info.type, info.shape[-1])
    assert np.array_equal(found, codes[name])
    assert (scales == NEAREST).all()


@pytest.mark.parametrize(("command", "name"), [(gguf, "a.gguf"), (onnx, "a.onnx")])
def test_verify_proves_it_with_the_flag_and_refuses_without(tmp_path, command, name):
    folder, codes = _folder(tmp_path)
    _run(command, folder, tmp_path / name, "--round-scales")
    report = json.loads(_run(verify, folder, tmp_path / name, "--round-scales", "--json").stdout)
    assert report["equal"]
    assert report["codes"] == sum(c.size for c in codes.values())
    with pytest.raises(Exception, match="no fp16 numbers"):
        _run(verify, folder, tmp_path / name)


@pytest.mark.parametrize("scale", [2.0**-15, 1e-9, 7e4], ids=["subnormal", "vanishes", "overflows"])
def test_a_scale_that_fp16_does_not_have_is_refused(tmp_path, scale):
    folder, _ = _folder(tmp_path, np.float32(scale) * np.float32(1.0001))
    checkpoint = open_checkpoint(folder, round_scales=True)
    with pytest.raises(NotTernaryError, match="is not ternary") as caught:
        checkpoint.codes("backbone.layers.0.mixer.in_proj.weight")
    assert not isinstance(caught.value, ScaleError)


def test_what_is_not_ternary_stays_refused(tmp_path):
    write_checkpoint(tmp_path / "ckpt", SMALL, random_tensors(SMALL))
    with pytest.raises(NotTernaryError, match=r"is not ternary.*--ptq rtn"):
        _run(gguf, tmp_path / "ckpt", tmp_path / "a.gguf", "--round-scales")


def test_an_exact_one_is_the_same_with_the_flag(tmp_path):
    folder, _ = _folder(tmp_path, np.float16(0.02))
    _run(gguf, folder, tmp_path / "a.gguf")
    assert "error of a scale in fp16 is 0.0e+00" in _run(gguf, folder, tmp_path / "b.gguf", "--round-scales").stderr
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_ptq_keeps_scales_of_groups_that_the_widest_would_join(tmp_path):
    """Groups of 64 with scales of their own, and one matrix that is not ternary: the exact ones stay exact."""
    rng, tensors, exact = np.random.default_rng(4), random_tensors(SMALL), {}
    names = [name for name in tensors if name.endswith("_proj.weight")]
    for name in names[1:]:
        n, k = tensors[name].shape
        scales = np.float16(2**-9) * rng.integers(1, 9, (n, k // 64)).astype(np.float16)
        exact[name] = rng.integers(-1, 2, (n, k)) * np.repeat(scales, 64, 1).astype(np.float32)
        tensors[name] = exact[name].astype(np.float32)
    write_checkpoint(tmp_path / "ckpt", SMALL, tensors)
    _run(gguf, tmp_path / "ckpt", tmp_path / "a.gguf", "--ptq", "rtn")
    file = open_gguf(tmp_path / "a.gguf")
    for name, values in exact.items():
        other = SMALL.tensors[name].gguf
        info = file.tensors[other]
        codes, scales = decode_codes(file.blocks(other), info.type, info.shape[-1])
        found = codes * np.repeat(scales, info.shape[-1] // scales.shape[1], 1).astype(np.float32)
        assert np.array_equal(found.reshape(values.shape), values)
