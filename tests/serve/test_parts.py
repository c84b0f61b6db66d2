"""Templates, stop texts and grammars by themselves."""

import time
import tracemalloc

import jinja2
import numpy as np
import pytest

from runtime_ref.command import DEMO_MODEL
from runtime_ref.sampling import Sampling, descending
from runtime_ref.serve.choice import Choice, StopTexts, score
from runtime_ref.serve.vocabulary import Vocabulary
from runtime_ref.tokenizer import Tokenizer
from tmexport.chat_template import ChatTemplate, template_fault
from tmexport.errors import TextError, TmexportError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "user", "content": "a {{ b }}"}, {"role": "assistant", "content": "ü"}]


def template(text):
    return ChatTemplate(text, TOKENS, "x.gguf")


def test_a_template_renders_as_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    text = (
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "{{ '<|' + m['role'] + '|>' }}\n{{ m.content | trim | tojson }}{{ eos_token }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for answer in (True, False):
        (wanted,), _ = render_jinja_template([MESSAGES], chat_template=text, add_generation_prompt=answer, **TOKENS)
        assert template(text).render(MESSAGES, answer) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}\n  {%- generation -%}\n x {{ m.content }} \n {%- endgeneration -%}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{% set a = m.role %}{{ a }}{% endgeneration %}{{ a }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(true) }}{{ messages | tojson(false, 2) }}",
        "{{ messages[1] | tojson(separators=(',', ':'), sort_keys=true) }}{{ messages[1] | tojson(ensure_ascii=true) }}",
        "{{ tools is none }}{{ tools is defined }}{{ documents is defined }}{{ documents is none }}{{ nope is defined }}",
        "a\r\n{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(bos_token) }}{{ messages[-1:] | map(attribute='role') | join }}\n",
    ],
)
def test_what_templates_use_gives_transformers_text(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    (wanted,), _ = render_jinja_template([MESSAGES], chat_template=text, add_generation_prompt=True, **TOKENS)
    assert template(text).render(MESSAGES) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'a' * 10000000 }}", "too large"),
        ("{{ 9 ** 9 }}", "too large"),
        ("{{ range(10 ** 9) }}", "too large"),
        ("{{ range(1000000) }}", "OverflowError"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "characters",
        ),
        ("{% for i in range(100) %}{{ 'a' * 900000 }}{% endfor %}", "characters"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[9].content.x.y }}", "UndefinedError"),
    ],
)
def test_a_hostile_template_is_refused(text, said):
    with pytest.raises(TextError, match=said):
        template(text).render(MESSAGES)


def test_a_slow_template_is_stopped():
    began = time.monotonic()
    with pytest.raises(TextError, match="takes longer"):
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}").render(MESSAGES)
    assert time.monotonic() - began < 30


DAMAGED = {
    "for without end": "{% for %}",
    "open": "{{",
    "an end too many": "{% include 'x' %}{% endfor %}",
    "break outside a loop": "{% break %}",
    "25 loops": "{% for i in x %}" * 25 + "{% endfor %}" * 25,
    "an argument twice": "{{ f(a=1, a=2) }}",
    "5,000 digits": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_template_is_one_line(text):
    with pytest.raises(TmexportError, match=r"x\.gguf: the chat template is damaged"):
        template(text)
    assert "\n" not in (template_fault(text) or "\n")


@pytest.mark.parametrize(
    "expression",
    [
        "'x' | center(1000000000)",
        "'x'.center(1000000000)",
        "'%1000000000d' % 1",
        "[1] | batch(1000000000, 2) | list | length",
        "'a' | indent(width=1000000000, first=true)",
    ],
)
def test_sizes_are_bounded_and_nothing_is_computed_while_compiling(expression):
    tracemalloc.start()
    try:
        assert template_fault("{{ " + expression + " }}") is None
        with pytest.raises(TextError, match="too large|of a size above 1000000"):
            template("{{ " + expression + " }}").render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("'x' | center(5)", "  x  "),
        ("'%5d' % 7", "    7"),
        ("17 % 5", "2"),
        ("[3, 1] | sort | map('string') | join('-')", "1-3"),
        ("missing | default(4000000000)", "4000000000"),
    ],
)
def test_filters_still_compute(expression, wanted):
    assert template("{{ " + expression + " }}").render(MESSAGES) == wanted


def test_jinja_is_the_real_one():
    assert jinja2.__version__ >= "3.1"


@pytest.mark.parametrize("text", ["abcabd", "ababc", "xaaabyaab", "no stop at all", "aab", ""])
@pytest.mark.parametrize("stops", [("aab",), ("abc", "b"), ("abd",), ()])
def test_stop_texts_equal_a_search_of_the_whole(text, stops):
    """However the text is cut, what is shown is what comes before the earliest stop text to be completed."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    for size in (1, 2, 3, 100):
        finder, shown, stopped = StopTexts(stops), "", False
        for at in range(0, len(text), size):
            more, stopped = finder.push(text[at : at + size])
            shown += more
            if stopped:
                break
        shown += "" if stopped else finder.flush()
        assert stopped == bool(ends)
        if not ends:
            assert shown == text
        elif size == 1:
            assert shown == text[: min(at for end, at in ends if end == min(ends)[0])]
        else:
            assert shown in [text[:at] for _, at in ends]


@pytest.mark.parametrize("seed", range(5))
def test_orders_equal_a_stable_sort(seed):
    """Rounded, so that many are equal; zeros of both signs, infinities, the smallest and largest numbers."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(3001).astype(np.float32) * 3, seed)
    logits[rng.integers(0, 3001, 40)] = np.tile(
        np.float32([0.0, -0.0, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0]), 5
    )
    wanted = np.argsort(-logits, kind="stable")
    assert (descending(logits) == wanted).all()
    plain = np.clip(logits, -20, 20)
    (scored,) = score(plain[None], [7], 20)
    assert [token for token, _ in scored.top] == list(np.argsort(-plain, kind="stable")[:20])


def test_a_choice_shows_whole_characters_and_ends_at_its_limit():
    """Logits that force the bytes of a text: what is shown is that text, its last character cut by the limit."""
    tokenizer = Tokenizer.from_gguf(DEMO_MODEL)
    vocabulary = Vocabulary(tokenizer, 3840)
    single = {piece: i for i, piece in enumerate(vocabulary.pieces) if len(piece) == 1}
    ids = [single[bytes([b])] for b in "naïve ☃".encode()]
    choice, shown = Choice(0, vocabulary, Sampling(), (0,), len(ids) - 1), []
    for token in ids[:-1]:
        logits = np.zeros(3840, np.float32)
        logits[token] = 1
        piece = choice.step(logits)
        shown.append(piece.text if piece else "")
    assert "".join(shown) == "naïve \ufffd"
    assert choice.reason == "length"
    assert choice.tokens == ids[:-1]
