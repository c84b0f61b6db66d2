"""The name that `tmexport generate MODEL.onnx` had before: python -m tmexport.onnx.generate MODEL.onnx --prompt ..."""

from tmexport.cli import run_verb

if __name__ == "__main__":
    run_verb("generate", "python -m tmexport.onnx.generate")
