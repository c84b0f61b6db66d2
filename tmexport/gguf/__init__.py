"""GGUF, the file format of llama.cpp: types, encoding, decoding, reading and writing."""
