"""What a server must refuse, and what it must survive: a 4xx and one line each, and it lives."""

import http.client
import json
import os
import random
import time

import pytest

from tests.serve.running import Server, request_bytes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]


def refused(status, text, wanted=400):
    assert status == wanted, text
    error = json.loads(text)["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in text
    return error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt is not"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": []}, "prompt is not"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": [3840]}, "token 3840; expected 0 to 3839"),
        ({"prompt": [-1]}, "token -1"),
        ({"prompt": [1.5]}, "neither a text"),
        ({"prompt": [True]}, "neither a text"),
        ({"prompt": ["a", 3]}, "neither a text"),
        ({"prompt": ["a"] * 65}, "1 to 64"),
        ({"prompt": "\ud800"}, "cannot be tokenised"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "a", "max_tokens": 2.0}, "max_tokens is 2.0; expected a whole number"),
        ({"prompt": "a", "max_tokens": 10**30}, "expected a whole number from 0 to 4096"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": [1] * 4090, "max_tokens": 10}, "takes 4096 together"),
        ({"prompt": "a", "temperature": "hot"}, 'temperature is "hot"'),
        ({"prompt": "a", "temperature": -0.1}, "temperature is -0.1"),
        ({"prompt": "a", "top_p": 1.01}, "top_p is 1.01"),
        ({"prompt": "a", "n": 9}, "at most 8"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "a", "best_of": 2}, "does not do that"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21"),
        ({"prompt": "a", "stop": [""]}, "not empty"),
        ({"prompt": "a", "stop": ["a"] * 17}, "at most 16"),
        ({"prompt": "a", "stream": "yes"}, "stream is"),
        ({"prompt": "a", "stream": 1}, "stream is 1"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "a", "logit_bias": {"3": 1}}, "does not do that"),
        ({"prompt": "a", "presence_penalty": 0.5}, "does not do that"),
        ({"prompt": "a", "min_p": 0.1}, "min_p is not a field"),
        ({"prompt": "a", "a\nb": 0.1}, "is not a field"),
        ({"prompt": "a", "grammar": "root ::= ("}, "grammar cannot be used"),
        ({"prompt": "a", "grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "give one"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "no known type"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "no known type"),
        ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "JSON schema cannot"),
        ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "JSON schema cannot"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_completion_that_cannot_be(server, body, said):
    assert said in refused(*server.ask("POST", COMPLETIONS, body))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages is not a list"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": ["a"]}, "messages[0] is not an object"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role is none of"),
        ({"messages": [{"role": [], "content": "a"}]}, "messages[0].role is none of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not a text"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "surrogate"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "needs logprobs"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "does not do that"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_a_chat_that_cannot_be(server, body, said):
    assert said in refused(*server.ask("POST", CHAT, body))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "no JSON number"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
    ],
)
def test_a_body_that_is_no_object(server, body, said):
    assert said in refused(*server.ask("POST", COMPLETIONS, body))


def test_other_requests_that_cannot_be(server):
    refused(*server.ask("GET", "/v2"), 404)
    refused(*server.ask("GET", COMPLETIONS), 405)
    refused(*server.ask("POST", COMPLETIONS, {"prompt": "a", "model": "gpt-4"}), 404)
    refused(*server.ask("POST", COMPLETIONS, {"prompt": "a"}, {"Content-Type": "text/plain"}), 415)
    assert "own name" in refused(*server.ask("GET", "/v1/models", headers={"Host": "evil.example"}), 403)
    refused(*server.ask("POST", COMPLETIONS, b" " * 8_000_001), 413)
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_random_bodies(server):
    """Bytes, and good requests with a value replaced: nothing but 200 and 4xx comes back."""
    rng = random.Random(7)
    values = [
        None,
        True,
        0,
        -1,
        2**70,
        1e308,
        "",
        "a",
        "\x00",
        [],
        [[]],
        {},
        [None],
        {"type": "json_object"},
        [1, 2],
        "\ud800",
    ]
    for _ in range(150):
        body = {"prompt": "a", "max_tokens": 1, "temperature": 0} | {
            rng.choice(["prompt", "max_tokens", "stop", "n", "seed", "logprobs", "echo", "top_k", "response_format", "grammar", "stream"]): rng.choice(values)
        }  # fmt: skip
        status, text = server.ask("POST", COMPLETIONS, body)
        if status != 200:
            assert 400 <= status < 500, (body, text)
            refused(status, text, status)
    for _ in range(50):
        refused(*server.ask("POST", rng.choice([COMPLETIONS, CHAT]), rng.randbytes(rng.randrange(200))))
    assert json.loads(server.ask("GET", "/health")[1])["status"] == "ok"


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_work_with_it(server, stream):
    body = {"prompt": "The army", "max_tokens": 4000, "seed": 1, "n": 4, "stream": stream}
    connection = server.connect()
    connection.sendall(request_bytes(COMPLETIONS, body))
    wait_until(lambda: server.metric("tmexport_running") == 4)
    before = server.metric("tmexport_generated_tokens_total")
    connection.close()
    wait_until(lambda: server.metric("tmexport_running") == 0)
    assert server.metric("tmexport_generated_tokens_total") < before + 12_000


def test_connections_half_closed_or_silent_do_no_harm(server):
    quiet = [server.connect() for _ in range(20)]
    half = server.connect()
    half.sendall(request_bytes(COMPLETIONS, {"prompt": "a", "max_tokens": 4000}))
    half.shutdown(1)  # SHUT_WR: it would still read
    part = server.connect()
    part.sendall(request_bytes(COMPLETIONS, {"prompt": "a"})[:-3])
    assert server.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2
    for connection in (*quiet, half, part):
        connection.close()
    wait_until(lambda: server.metric("tmexport_running") == 0)


def test_a_key_is_asked_for():
    environment = os.environ | {"TMEXPORT_API_KEY": "kä secret"}
    with Server("--threads", 1, "--parallel", 1, "--queue", 1, "--timeout", 1.5, environment=environment) as server:
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "kä".encode()}):
            refused(*server.ask("GET", "/v1/models", headers=shown), 401)
            refused(*server.ask("POST", COMPLETIONS, {"prompt": "a"}, shown), 401)
            refused(*server.ask("GET", "/metrics", headers=shown), 401)
        key = {"Authorization": "Bearer kä secret".encode()}
        assert server.ask("GET", "/v1/models", headers=key)[0] == 200
        assert server.ask("GET", "/health")[0] == 200
        assert "no chat template" in refused(*server.ask("POST", CHAT, {"messages": MESSAGES}, key))
        check_queue(server, key)
    assert "Traceback" not in server.stderr


def check_queue(server, key):
    """One text at a time and one waits; after 1.5 seconds a text ends where it is."""
    connections = [server.connect() for _ in range(2)]
    body = {"prompt": "The army", "max_tokens": 60_000, "temperature": 0}
    for connection in connections:
        connection.sendall(request_bytes(COMPLETIONS, body, Authorization="Bearer kä secret"))
        time.sleep(0.2)
    refused(*server.ask("POST", COMPLETIONS, body, key), 429)
    answers = [read_answer(connection) for connection in connections]
    assert answers[0][0] == 200
    assert answers[1][0] in (200, 503)  # it has had a moment, or none
    whole = json.loads(answers[0][1])
    assert whole["choices"][0]["finish_reason"] == "length"
    assert 0 < whole["usage"]["completion_tokens"] < 60_000
    for connection in connections:
        connection.close()


def read_answer(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read().decode()
