"""onnxruntime-genai runs the files that `--io-names genai` writes, by its own loop, to the tokens of runtime_ref.ort."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from runtime_ref.ort import OrtModel
from tests.models import coded_tensors, train_tokenizer
from tests.onnx.exporting import FORMS, UNTIED, run, write_ternary
from tests.tmexport.families import save
from tmexport.checkpoint import write_checkpoint
from tmexport.model import mamba1_model

# onnxruntime_genai is imported where it is used: it needs a newer onnxruntime than the lowest that we take, with which the others run.
TEXTS = ([5, 17, 33, 2, 40], [250, 7, 7, 99, 120])
NEW = 20


def tokens_of(folder, prompts):
    """Its loop, greedy: the new tokens of each text."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=len(prompts[0]) + NEW)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(i)))[len(prompts[0]) :] for i in range(len(prompts))]


def checkpoint_of(name, folder):
    """A random model of a family, whose tokens differ: an untied head, or large weights."""
    if name == "mamba2":
        write_ternary(folder, UNTIED)
    elif name == "mamba":
        folder.mkdir()
        config = mamba1_model(256, 2, 512, tie_embeddings=False)
        write_checkpoint(folder, config, coded_tensors(config, "ternary"), train_tokenizer(folder / "tokenizer.json"))
    else:
        save(name, folder)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ("mamba2", "granite-rope-8-groups") for form in FORMS]
    + [("mamba", "portable"), ("falcon", "ort"), ("llama", "custom")],
)
def test_its_loop_gives_our_tokens(tmp_path, name, form):
    checkpoint_of(name, tmp_path / "ckpt")
    kind = "auto" if name.startswith("mamba") else "f32"
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "m.onnx"
    result = run("onnx", tmp_path / "ckpt", path, "--ops", form, "--io-names", "genai", "--type", kind)
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    config["model"].pop("eos_token_id", None)  # so that no text ends before the last token
    (tmp_path / "out" / "genai_config.json").write_text(json.dumps(config))
    model = OrtModel.load(path, threads=1)
    wanted = [list(model.generate(text, NEW)) for text in TEXTS]
    assert tokens_of(path.parent, TEXTS[:1]) == wanted[:1]
    assert len(set(wanted[0])) > 3
    if form != "ort":  # two texts at once are another order of additions there
        config["model"]["pad_token_id"] = 0
        (tmp_path / "out" / "genai_config.json").write_text(json.dumps(config))
        assert tokens_of(path.parent, TEXTS) == wanted


def test_its_tokenizer_and_its_end(tied, tmp_path):
    """Texts become the ids of tokenizers and back; a token of `eos_token_id` ends a text."""
    run("onnx", tied.path, tmp_path / "m.onnx", "--io-names", "genai")
    names = {
        "genai_config.json",
        "m.config.json",
        "m.onnx",
        "m.tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in tmp_path.iterdir()} == names
    import onnxruntime_genai as genai

    theirs, text = genai.Tokenizer(genai.Model(str(tmp_path))), "def f(x):\n    return  x + 1  # Ä, 12"
    ids = Tokenizer.from_file(str(tied.tokenizer)).encode(text).ids
    assert list(theirs.encode(text)) == ids
    assert theirs.decode(np.array(ids, np.int32)) == text
    first = tokens_of(tmp_path, [ids])[0][0]
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0]
    config["model"]["eos_token_id"] = [first]
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    assert tokens_of(tmp_path, [ids]) == [[]]


def test_the_checkpoints_own_folder_is_refused(tied):
    result = run("onnx", tied.path, tied.path / "m.onnx", "--io-names", "genai")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "whose tokenizer.json onnxruntime-genai's would replace" in result.stderr
