"""The program `python -m zero_shot`: see cli.py."""

from tmexport.cli import run_verb

if __name__ == "__main__":
    run_verb("zero-shot", "python -m zero_shot")
