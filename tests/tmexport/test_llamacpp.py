"""A stock llama.cpp loads every type, tokenises as the tokenizer does, and computes what transformers computes."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.llama import Llama
from tests.models import SMALL, write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.gguf.export import plan_export
from tmexport.model import mamba2_model

TEXTS = [
    "Fellow citizens of the Senate, it's 1862.",
    "  two spaces\n\n\nlines\tand tabs  ",
    "naïve café — 日本語 🚀 <|endoftext|> don't",
    "x = [1, 22, 333, 4444]; y_z != 'q'",
]


def export(folder, kind, embedding="f16"):
    path = folder / f"{kind}-{embedding}.gguf"
    plan_export(open_checkpoint(folder / "ckpt"), kind, embedding).write(path, lambda tensor: None)
    return path


PROMPTS = [
    "Fellow citizens", "The state of", "In 1862,", "war and peace\n", "I thank", "Congress", "the 4th of March", "a nation's",
    "$2,000 for", "We the people", "It is", "our army and navy", "of the United States", "No", "treaty with", "every man",
]  # fmt: skip


def clear_continuations(model, tokenizer, wanted=5, count=64):
    """Prompts with transformers' greedy continuation and its log probabilities.

    Only those without a near tie, which llama.cpp's fp16 activations (log probabilities within about 0.002) would decide.
    """
    chosen = []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt).ids
        answer = model.generate(
            torch.tensor([tokens]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack([torch.log_softmax(logits[0], -1).topk(2).values for logits in answer.logits])
        if float((best[:, 0] - best[:, 1]).min()) > 0.005:
            chosen.append((tokens, answer.sequences[0, len(tokens) :].tolist(), best[:, 0].tolist()))
    assert len(chosen) >= wanted
    return chosen[:wanted]


@pytest.mark.parametrize(
    "config",
    [SMALL, mamba2_model(256, 2, 512, d_state=128, n_groups=2, tie_embeddings=False)],
    ids=["one group", "two groups"],
)
def test_f16_continues_as_transformers_does(tmp_path, config):
    """Greedy, 64 tokens from each of 5 prompts: the same tokens, with the same log probabilities."""
    write_small(tmp_path / "ckpt", config)
    model = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "ckpt")
    llama = Llama(export(tmp_path, "f16"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "ckpt" / "tokenizer.json"))
    for tokens, expected, log_probabilities in clear_continuations(model, tokenizer):
        found = llama.greedy(tokens, 64)
        assert [token for token, _ in found] == expected
        assert max(abs(ours - theirs) for (_, ours), theirs in zip(found, log_probabilities, strict=True)) < 0.01


@pytest.mark.parametrize(("kind", "group_size"), [("tq1_0", 256), ("tq2_0", 256), ("q2_0", 256), ("q2_0", 64)])
def test_ternary_types_compute_the_model(tmp_path, kind, group_size):
    """Its int8 activations cost something; the most likely token's log probability stays within 0.1 of transformers'."""
    write_small(tmp_path / "ckpt", group_size=group_size)
    source = open_checkpoint(tmp_path / "ckpt")
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**source.config.to_hf()))
    model.load_state_dict({name: torch.from_numpy(source.dense(name)) for name in source.names})
    llama = Llama(export(tmp_path, kind))
    tokens = [40, 41, 42, 43, 44]
    with torch.no_grad():
        for _ in range(16):
            token, log_probability = llama.next_token(tokens)
            expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1)
            assert abs(float(expected[token]) - log_probability) < 0.1
            tokens.append(token)


def test_llamacpp_tokenises_as_the_tokenizer_does(tmp_path):
    write_small(tmp_path / "ckpt", group_size=256)
    llama = Llama(export(tmp_path, "auto", "q8_0"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "ckpt" / "tokenizer.json"))
    for text in TEXTS:
        plain = text.replace("<|endoftext|>", "")  # the server is asked not to parse special tokens
        assert llama.tokenize(plain) == tokenizer.encode(plain).ids
