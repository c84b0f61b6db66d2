"""Programs that people already have, unmodified, against a server process; what they get is what the library computes."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import openai
import pytest

from runtime_ref.command import DEMO_MODEL
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling
from runtime_ref.tokenizer import Tokenizer
from tests.serve.running import TEMPLATE
from tmexport.chat_template import ChatTemplate
from tmexport.gguf.reader import open_gguf

PROMPT = "Fellow citizens of the Senate and the House"
END = 0


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model():
    return Model.load(DEMO_MODEL, "exact", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(DEMO_MODEL)


def text_of(model, tokenizer, ids, count, sampling=None):
    return tokenizer.decode(list(model.generate(ids, count, sampling, stop=(END,))))


def reference_scores(model, ids):
    """log p of each token after the first, fp64, by single steps and the textbook's formula."""
    state, found = model.new_state(), []
    for given, target in itertools.pairwise(ids):
        row = model.decode(state, given).astype(np.float64)
        found.append(row[target] - row.max() - np.log(np.exp(row - row.max()).sum()))
    return found


def test_models(client):
    assert [m.id for m in client.models.list()] == ["sotu"]
    assert client.models.retrieve("sotu").owned_by == "tmexport"
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.models.retrieve("gpt-4")


def test_a_greedy_completion_is_generates(client, model, tokenizer):
    got = client.completions.create(model="sotu", prompt=PROMPT, max_tokens=40, temperature=0)
    assert got.choices[0].text == text_of(model, tokenizer, tokenizer.prompt(PROMPT), 40)
    assert got.choices[0].finish_reason == "length"
    assert got.usage.completion_tokens == 40
    assert got.usage.prompt_tokens == len(tokenizer.prompt(PROMPT))


def test_a_seed_draws_what_generate_draws(client, model, tokenizer):
    how = Sampling(0.9, 0, 0.95, 1234)
    got = client.completions.create(model="sotu", prompt=PROMPT, max_tokens=30, temperature=0.9, top_p=0.95, seed=1234, n=3)  # fmt: skip
    texts = [c.text for c in got.choices]
    assert texts[0] == text_of(model, tokenizer, tokenizer.prompt(PROMPT), 30, how)
    assert len(set(texts)) == 3
    again = client.completions.create(model="sotu", prompt=PROMPT, max_tokens=30, temperature=0.9, top_p=0.95, seed=1234, n=3)  # fmt: skip
    assert [c.text for c in again.choices] == texts


def test_streams_add_up_to_the_answer(client):
    common = {"model": "sotu", "prompt": [PROMPT, "The army"], "max_tokens": 24, "temperature": 0.7, "seed": 5, "n": 2}
    whole = client.completions.create(**common)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in client.completions.create(**common, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage
    assert texts == [c.text for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_echo_scores_the_prompt_as_evaluations_ask(client, model, tokenizer):
    """lm-eval's request: token ids, echo, one token, log-probabilities of all of them."""
    ids = tokenizer.encode(PROMPT + " of Representatives, I congratulate you. " * 12)
    assert len(ids) > 128
    got = client.completions.create(model="sotu", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1)  # fmt: skip
    scores = got.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1 : len(ids)] == pytest.approx(reference_scores(model, ids), abs=1e-12)
    assert len(scores.tokens) == len(scores.top_logprobs) == len(ids) + 1
    for logprob, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert max(top.values()) >= logprob
    assert got.choices[0].text.startswith(tokenizer.decode(ids))
    offsets = scores.text_offset
    assert [got.choices[0].text[a:b] for a, b in itertools.pairwise(offsets)] == scores.tokens[:-1]


def test_a_prompt_alone_can_be_scored(client, tokenizer):
    got = client.completions.create(model="sotu", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert got.choices[0].text == PROMPT
    assert len(got.choices[0].logprobs.tokens) == len(tokenizer.encode(PROMPT))


def test_chat_is_the_template_and_generate(client, model, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is the Union?"}]
    template = ChatTemplate.from_gguf(open_gguf(DEMO_MODEL), TEMPLATE)
    text = template.render(messages)
    assert text == "System: Be brief.\n\nUser: How is the Union?\n\nAssistant:"
    got = client.chat.completions.create(model="sotu", messages=messages, max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=3)  # fmt: skip
    choice = got.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(model, tokenizer, tokenizer.encode(text), 20)
    assert bytes(b for t in choice.logprobs.content for b in t.bytes).decode() == choice.message.content
    for token in choice.logprobs.content:  # greedy: the chosen one is the likeliest
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 3
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    stream = client.chat.completions.create(model="sotu", messages=parts, max_tokens=20, temperature=0, stream=True)
    chunks = [c.choices[0] for c in stream]
    assert "".join(c.delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_shown(client, stream):
    common = {"model": "sotu", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    plain = client.completions.create(**common).choices[0].text
    stop = plain[25:32]  # begins and ends inside tokens, and its beginning occurs earlier
    got = client.completions.create(**common, stop=["never", stop], stream=stream)
    if stream:
        chunks = [c.choices[0] for c in got]
        text, reason = "".join(c.text for c in chunks), chunks[-1].finish_reason
    else:
        text, reason = got.choices[0].text, got.choices[0].finish_reason
    assert text == plain[: plain.index(stop)]
    assert reason == "stop"


def test_a_schema_is_kept_to(client):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["year", "state"],
        "properties": {"year": {"type": "integer", "minimum": 1790, "maximum": 2020}, "state": {"enum": ["good", "bad"]}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "union", "schema": schema, "strict": True}}
    for seed in range(5):
        got = client.chat.completions.create(model="sotu", messages=[{"role": "user", "content": "Which year?"}],
                                             response_format=form, max_tokens=200, temperature=1, seed=seed)  # fmt: skip
        if got.choices[0].finish_reason == "stop":
            value = json.loads(got.choices[0].message.content)
            assert set(value) == {"year", "state"}
            assert 1790 <= value["year"] <= 2020
            assert value["state"] in ("good", "bad")
            break
    else:
        raise AssertionError("no answer came to its end")


@pytest.mark.parametrize("grammar", ['root ::= "yes" | "no, " [0-9] [0-9]', 'start: "yes" | /no, [0-9][0-9]/'])
def test_a_grammar_is_kept_to(client, grammar):
    for seed in range(6):
        got = client.completions.create(model="sotu", prompt=PROMPT, max_tokens=20, seed=seed, extra_body={"grammar": grammar})  # fmt: skip
        text = got.choices[0].text
        assert got.choices[0].finish_reason == "stop"
        assert text == "yes" or (text.startswith("no, ") and len(text) == 6 and text[4:].isdigit())


QUESTION = "How is the Union?"


@pytest.fixture(scope="module")
def answer(model, tokenizer):
    return text_of(model, tokenizer, tokenizer.encode(f"User: {QUESTION}\n\nAssistant:"), 20)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydantic's, about litellm's own types
@pytest.mark.parametrize("stream", [False, True])
def test_litellm(server, answer, stream):
    import litellm  # takes seconds

    messages = [{"role": "user", "content": QUESTION}]
    got = litellm.completion("openai/sotu", messages, api_base=f"{server.url}/v1", api_key="none", temperature=0,
                             max_tokens=20, stream=stream)  # fmt: skip
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in got) == answer
    else:
        assert got.choices[0].message.content == answer
        assert got.usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [[], ["--no-stream"]])
def test_llm(server, answer, tmp_path, stream):
    """The command `llm`, told of the server as its documentation says."""
    about = f"- model_id: sotu\n  model_name: sotu\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(about)
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "sotu",
        QUESTION,
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "20",
        *stream,
    ]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer.strip()
