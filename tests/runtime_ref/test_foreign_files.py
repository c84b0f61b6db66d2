"""GGUF files that another program wrote (no keys of ours), several end tokens, and a BOS before the prompt."""

import json

import gguf as peer
import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from runtime_ref.generate import generate
from runtime_ref.tokenizer import Tokenizer
from tests.commands import invoke
from tests.models import SMALL, write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TokenizerError
from tmexport.gguf.export import plan_export

PROMPT = "Fellow citizens, it's 1862."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign")
    write_small(path / "ckpt", SMALL)
    return path


def stock_copy(source, out, kind, keep=lambda name: not name.startswith(("tmexport.", "tokenizer.huggingface"))):
    """The file as llama.cpp's converter writes it: matrices in `kind`, no keys of ours (gguf-py writes it)."""
    reader, writer = peer.GGUFReader(source), peer.GGUFWriter(out, "mamba2")
    for item in reader.fields.values():
        if not item.name.startswith(("GGUF.", "general.architecture")) and keep(item.name):
            is_array = item.types[0] == peer.GGUFValueType.ARRAY
            writer.add_key_value(item.name, item.contents(), item.types[0], item.types[-1] if is_array else None)
    for tensor in reader.tensors:
        values = peer.dequantize(tensor.data, tensor.tensor_type)
        big = tensor.name.endswith(("ssm_in.weight", "ssm_out.weight", "token_embd.weight", "output.weight"))
        chosen = kind if big else peer.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, peer.quantize(values.astype(np.float32), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_stock_file_is_run_with_its_own_vocabulary_or_a_given_one(folder, kind):
    plan_export(open_checkpoint(folder / "ckpt"), "f16").write(folder / "ours.gguf", lambda tensor: None)
    path = stock_copy(folder / "ours.gguf", folder / f"{kind}.gguf", peer.GGMLQuantizationType[kind])
    expected = Library.from_file(str(folder / "ckpt" / "tokenizer.json")).encode(PROMPT).ids
    assert Tokenizer.from_gguf(path).encode(PROMPT) == expected
    own = invoke(generate, path, "--prompt", PROMPT, "-n", 2, "--json")
    given = invoke(
        generate, path, "--prompt", PROMPT, "-n", 2, "--json", "--tokenizer", folder / "ckpt" / "tokenizer.json"
    )
    assert json.loads(own.stdout)["tokens"] == json.loads(given.stdout)["tokens"]
    assert json.loads(own.stdout)["prompt_tokens"] == len(expected)


def test_a_vocabulary_that_is_not_known_asks_for_a_tokenizer(folder):
    plan_export(open_checkpoint(folder / "ckpt"), "f16", ids_only=True).write(folder / "ids.gguf", lambda tensor: None)
    with pytest.raises(TokenizerError, match="give the model's tokenizer.json with --tokenizer"):
        Tokenizer.from_gguf(folder / "ids.gguf")
    found = Tokenizer.from_gguf(folder / "ids.gguf", folder / "ckpt" / "tokenizer.json")
    assert found.encode("a") == Library.from_file(str(folder / "ckpt" / "tokenizer.json")).encode("a").ids


def test_a_bos_is_put_before_the_prompt_and_any_end_token_ends(tmp_path):
    write_small(tmp_path / "ckpt", SMALL)
    path = tmp_path / "ckpt" / "tokenizer.json"
    raw = json.loads(path.read_text())
    end, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    raw["post_processor"] = {"type": "TemplateProcessing", "single": [end, text], "pair": [end, text, {"Sequence": {"id": "B", "type_id": 0}}],
                             "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    path.write_text(json.dumps(raw))

    def run(name):
        plan_export(open_checkpoint(tmp_path / "ckpt"), "f16").write(tmp_path / name, lambda tensor: None)
        return json.loads(invoke(generate, tmp_path / name, "--prompt", PROMPT, "-n", 12, "--json").stdout)

    first = run("one.gguf")
    plain = Library.from_file(str(path)).encode(PROMPT, add_special_tokens=False).ids
    assert first["prompt_tokens"] == 1 + len(plain)
    assert Tokenizer.from_gguf(tmp_path / "one.gguf").prompt(PROMPT) == [0, *plain]
    stop = first["tokens"][4]
    (tmp_path / "ckpt" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    at = first["tokens"].index(stop)
    assert run("two.gguf")["tokens"][:at] == first["tokens"][:at]
    assert len(run("two.gguf")["tokens"]) <= at + 1
