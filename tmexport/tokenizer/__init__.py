"""tokenizer.json: read safely, compared with what a GGUF can say, written as llama.cpp's keys, and read back from them.

parse.py     a stranger's tokenizer.json as a tokenizers.Tokenizer
splits.py    llama.cpp's names for the ways of splitting a text before the merges
features.py  every field of tokenizer.json: carried over, neutralised, warned about or refused
beside.py    what lies beside it: tokenizer_config.json, generation_config.json, chat_template.jinja
gguf.py      the tokenizer.* keys of a GGUF, both ways, and the tokens that end a generation
texts.py     the same texts tokenised by llama.cpp
"""
