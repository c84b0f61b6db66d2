"""The program `python -m runtime_ref.bench`."""

from runtime_ref.bench.cli import bench
from runtime_ref.command import run_command

if __name__ == "__main__":
    run_command(bench, "runtime_ref.bench")
