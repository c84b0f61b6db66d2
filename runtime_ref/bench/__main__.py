"""The program `python -m runtime_ref.bench`."""

from runtime_ref.bench.cli import bench
from tmexport.cli.app import run_command

if __name__ == "__main__":
    run_command(bench, "python -m runtime_ref.bench")
