"""How fast a GGUF model runs here: `python -m runtime_ref.bench MODEL.gguf`."""
