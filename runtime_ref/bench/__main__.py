"""The program `python -m runtime_ref.bench`."""

from tmexport.cli import run_verb

if __name__ == "__main__":
    run_verb("bench", "python -m runtime_ref.bench")
