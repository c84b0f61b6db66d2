"""Tokens that llama.cpp knows by their text alone (llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load)."""

from __future__ import annotations

from collections.abc import Mapping

# A generation ends at each of these, whatever the file's keys say.
ENDS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
        "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
_PADS_AND_FILES = {
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
}  # fmt: skip
_INFILLING = {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
}  # fmt: skip
_SHOWN = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}
# Any of these is looked for in a text, also where the vocabulary has it as an ordinary token.
SPECIAL = ENDS | _PADS_AND_FILES | _INFILLING | _SHOWN
_STRIPPING_NAMES = (("phi-3", "phi 3"), ("phi3", "phi 3"), ("modern-bert", "modern bert"))
NO_END = 11  # the id that llama.cpp takes for the end token, and for BOS, of a byte-level BPE whose file names none


def end_tokens(vocabulary: Mapping[str, int], first: int | None) -> tuple[int, ...]:
    """The tokens that end a generation: the model's own, and those that llama.cpp knows by name."""
    named = sorted(index for token, index in vocabulary.items() if token in ENDS)
    return tuple(dict.fromkeys(([] if first is None else [first]) + named))


def harmless_name(name: str) -> str:
    """A model's name without the words for which llama.cpp strips the spaces after special tokens."""
    for word, instead in _STRIPPING_NAMES:
        at = name.lower().find(word)
        while at >= 0:
            name = name[:at] + instead + name[at + len(word) :]
            at = name.lower().find(word)
    return name
