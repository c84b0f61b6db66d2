"""The model card, read by the Hub's own reader; what it says against what the files hold."""

import hashlib
import json
import math

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from tests.commands import invoke
from tests.demo.running import ROOT
from tests.models import write_small
from tests.test_zero_shot import DOCS, write_requests
from tmexport.cli import cli
from tmexport.model import mamba2_model

TEXT = "The state of the Union is strong, and so are its rivers | lakes. " * 20
UPLOAD = next(line for line in (ROOT / "docs" / "serve.md").read_text().splitlines() if line.startswith("hf upload "))


def run(*args):
    result = invoke(cli, *args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, a student of two steps with its export inside, and three evaluations."""
    home = tmp_path_factory.mktemp("card")
    write_small(home / "teacher", mamba2_model(d_model=256, n_layer=1, vocab_size=512, d_state=64))
    (home / "text.txt").write_text(TEXT)
    small = ["--steps", 2, "--batch-size", 1, "--seq-len", 64, "--threads", 1]
    given = ["--data", home / "text.txt", "--held-out", home / "text.txt"]
    run("train", "--teacher", home / "teacher", *given, "--out", home / "student", *small)
    run("gguf", home / "student", home / "student" / "m.gguf")
    data = write_requests(home / "questions", "winogrande", [(i, DOCS["winogrande"]) for i in range(2)])
    student = home / "student"
    for name, words in {
        "torch": ["evaluate", student, "--data", home / "text.txt"],
        "runtime": ["perplexity", student / "m.gguf", home / "text.txt"],
        "tasks": ["zero-shot", student, "--tasks", "winogrande", "--data", data, "--limit", 2],
    }.items():
        (home / f"{name}.json").write_text(run(*words, "--threads", 1, "--json"))
    return home


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_evaluation_says_what_it_was_made_with(home):
    found = json.loads((home / "torch.json").read_text())
    assert found["command"] == "tmexport evaluate student --data text.txt"
    assert found["text_sha256"] == {"text.txt": digest(home / "text.txt")}
    files = {name: digest(home / "student" / name) for name in ("m.gguf", "model.safetensors")}
    assert found["model_sha256"] == files
    assert json.loads((home / "runtime.json").read_text())["model_sha256"] == {"m.gguf": files["m.gguf"]}


def test_the_hub_reads_the_card(home):
    files = [word for name in ("torch", "runtime", "tasks") for word in ("--evaluation", home / f"{name}.json")]
    about = ["--base-model", "state-spaces/mamba2-130m", "--dataset", "you/speeches", "--license", "apache-2.0"]
    run("card", home / "student", *about, *files)
    card = ModelCard.load(home / "student" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["datasets"]) == ("tmexport", "apache-2.0", ["you/speeches"])
    assert (data["base_model"], data["base_model_relation"]) == ("state-spaces/mamba2-130m", "quantized")
    assert data["tags"] == ["ternary", "mamba2", "state-space-model", "cpu"]
    assert data["metrics"] == ["bits_per_byte", "perplexity", "accuracy"]
    score = json.loads((home / "torch.json").read_text())
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["text.txt", "bits_per_byte"] == pytest.approx(
        score["nats"] / math.log(2) / len(TEXT.encode()), rel=1e-3
    )
    assert results["winogrande, 2 examples", "acc"] in (0.0, 0.5, 1.0)
    text = card.text
    for name in ("model.safetensors", "m.gguf"):
        assert f"| `{name}` | `{digest(home / 'student' / name)}` |" in text
    assert "`tmexport evaluate student --data text.txt`" in text
    assert "steps 2, batch_size 1, seq_len 64" in text
    assert "tokens trained on: 128" in text  # 2 x 64
    assert str(home) not in text  # nobody's folders are published


def test_what_is_not_known_is_not_said(home):
    run("card", home / "teacher")
    data = ModelCard.load(home / "teacher" / "README.md").data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert data["library_name"] == "transformers"
    assert "Not evaluated." in (home / "teacher" / "README.md").read_text()


def test_provenance_is_told(home, tmp_path):
    run("ptq", "rtn", "--teacher", home / "teacher", "--out", tmp_path / "m", "--transform", "hadamard")
    run("card", tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert "hadamard" in card.text
    assert '- method: `"rtn"`' in card.text


def refused(*args):
    result = invoke(cli, "card", *args)
    assert (result.stdout, result.stderr.count("\n")) == ("", 1), result.stderr
    assert "unexpected" not in result.stderr
    return result.exit_code, result.stderr


def test_a_card_is_replaced_only_on_request(home, tmp_path):
    folder = write_small(tmp_path / "m", group_size=64)
    (folder / "README.md").write_text("mine")
    code, said = refused(folder)
    assert code == 1
    assert "--overwrite" in said
    assert (folder / "README.md").read_text() == "mine"
    run("card", folder, "--overwrite")
    assert "ternary" in (folder / "README.md").read_text()


def test_an_evaluation_of_another_model_is_refused(home, tmp_path):
    folder = write_small(tmp_path / "m", group_size=64)
    code, said = refused(folder, "--evaluation", home / "torch.json")
    assert code == 1
    assert "was measured on m.gguf" in said
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"command": "x", "model_sha256": {}}', '{"command": 1, "model_sha256": [1], "tasks": 3}',
     '{"command": "x", "model_sha256": {}, "tasks": {"a": {"examples": 1, "metrics": {"acc": {"value": "?"}}}}}',
     "\x00", '{"command": "x", "model_sha256": {}, "text_sha256": {}, "bits_per_byte": [], "perplexity": 1}'],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused(tmp_path, home, content):
    (tmp_path / "e.json").write_text(content)
    code, said = refused(home / "student", "--evaluation", tmp_path / "e.json", "--overwrite")
    assert code == 1
    assert str(tmp_path / "e.json") in said


@pytest.mark.parametrize("name", ["a b", "a/b/c", "", "x\ny", "../x"])
@pytest.mark.parametrize("option", ["--base-model", "--dataset", "--license"])
def test_ids_are_the_hubs(home, option, name):
    assert refused(home / "student", option, name, "--overwrite")[0] == 2


def test_what_the_documented_upload_takes(home):
    """`hf upload` filters as this function does."""
    files = [str(p.relative_to(home / "student")) for p in (home / "student").rglob("*") if p.is_file()]
    patterns = [word.strip("'") for word in UPLOAD.split()[5:]]
    taken = set(filter_repo_objects(files, ignore_patterns=patterns))
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.toml", "metrics.jsonl"} <= taken
    assert not [name for name in taken if "/" in name or name.endswith((".pt", ".png"))]
