"""python -m zero_shot: see cli.py."""

from runtime_ref.command import run_command
from zero_shot.cli import zero_shot

if __name__ == "__main__":
    run_command(zero_shot, "zero_shot")
