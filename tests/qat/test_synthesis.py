"""Answers that a teacher writes: greedy ones against forward passes without a state, runs that were cut, what is refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from qat.model import LanguageModel
from qat.synthesis.answers import Drawing, load_writer, synthesize
from qat.synthesis.cli import main
from tests.commands import invoke
from tmexport.checkpoint import write_checkpoint
from tmexport.model import llama_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<it> {% endif %}"
)
PROMPTS = ["The state of the Union", "Peace", "", "Congress " * 40, "of our country and its people", "War"]


@pytest.fixture(scope="module")
def teacher(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = LanguageModel(llama_model(64, 2, 300, 2, 128, 1, tie_embeddings=True, eos_token_id=0))
    write_checkpoint(
        folder, model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}, tokenizer_path
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_answers_are_those_of_whole_forward_passes(teacher, prompts, tmp_path):
    args = ["--teacher", teacher, "--prompts", prompts, "--out", tmp_path / "a.jsonl"]
    result = invoke(main, *args, "--temperature", 0, "--max-tokens", 72, "--batch", 4, "--json")
    said = json.loads(result.stdout)
    assert (said["answers"], said["passed_over"]) == (5, 1)  # the long one; the empty one is a question too
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    model = load_writer(teacher, None, raw=False).model
    for line in lines(tmp_path / "a.jsonl"):
        ids = tokenizer.encode(f"<user> {line['prompt']}\n<it> ", add_special_tokens=False).ids
        asked = len(ids)
        while len(ids) < 72 and (len(ids) == asked or ids[-1] != 0):
            ids.append(int((model.hidden(torch.tensor([ids]))[0, -1] @ model.head_weight.T).argmax()))
        assert line["text"] == tokenizer.decode(ids, skip_special_tokens=False)
        assert line["tokens"] == len(ids) - asked


def test_a_cut_run_goes_on_to_the_same_text(teacher, prompts, tmp_path):
    def run(out, stop_after=None, cut=0):
        done = []

        def on_batch(count):
            done.append(count)
            if len(done) == stop_after:
                raise KeyboardInterrupt

        writer, asked = load_writer(teacher, None, raw=True), [prompt for prompt in PROMPTS if prompt]
        synthesize(writer, asked, Drawing(64, 0.8, 5, 2), out, on_batch)

    run(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for stop, kept in ((1, None), (2, -7), (1, 0), (1, 5), (1, 20)):
        out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
        with pytest.raises(KeyboardInterrupt):
            run(out, stop)
        assert not out.exists()
        part.write_bytes(part.read_bytes()[:kept])  # as a power cut leaves it
        run(out)
        assert out.read_bytes() == whole
        assert not part.exists()
        out.unlink()
    assert {line["seed"] for line in map(json.loads, whole.splitlines())} == {5, 6, 7}


def test_what_is_refused(teacher, prompts, tokenizer_path, tmp_path):
    plain = tmp_path / "plain"
    write_checkpoint(plain, *_random(), tokenizer_path)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "Congress " * 400}) + "\n")
    (tmp_path / "there.jsonl").write_text("mine\n")
    other, mine = '{"made_of": "another"}\n{"batch"', "no line of ours"
    (tmp_path / "other.jsonl.part").write_text(other)
    (tmp_path / "mine.jsonl.part").write_text(mine)
    for code, message, options in (
        (2, "has no chat template; add --raw", {"--teacher": plain}),
        (2, "is there already", {"--out": tmp_path / "there.jsonl"}),
        (2, "holds the answers of another run", {"--out": tmp_path / "other.jsonl"}),
        (2, "holds the answers of another run", {"--out": tmp_path / "mine.jsonl"}),
        (2, "no prompt has between 1 and 192 tokens", {"--prompts": tmp_path / "long.jsonl"}),
        (2, "cannot be read", {"--prompts": tmp_path / "none.jsonl"}),
    ):
        given = {"--teacher": teacher, "--prompts": prompts, "--out": tmp_path / "o.jsonl"} | options
        result = invoke(main, *[word for pair in given.items() for word in pair])
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
        assert not (tmp_path / "o.jsonl").exists()
    assert (tmp_path / "there.jsonl").read_text() == "mine\n"
    assert (tmp_path / "other.jsonl.part").read_text() == other
    assert (tmp_path / "mine.jsonl.part").read_text() == mine


def _random():
    model = LanguageModel(llama_model(64, 2, 300, 2, 128, 1, tie_embeddings=True, eos_token_id=0))
    return model.config, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
