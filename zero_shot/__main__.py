"""The program `python -m zero_shot`: see cli.py."""

from tmexport.cli.app import run_command
from zero_shot.cli import zero_shot

if __name__ == "__main__":
    run_command(zero_shot, "python -m zero_shot")
