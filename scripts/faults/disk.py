"""Export onto full and read-only disks (small tmpfs mounts; needs root): one line, exit code 1, no debris, the old file kept.

Usage: python scripts/faults/disk.py

Every free size from none to almost enough is tried, with and without an old file under the name; then a read-only mount.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tmexport.cli.app import run_command

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from tmexport.cli import main; main()", "gguf"]
OLD = b"the old file"


def export(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, str(source), str(output)], cwd=ROOT, capture_output=True, text=True, check=False)


def mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


def check(problems: list[str], what: str, done: subprocess.CompletedProcess[str], place: Path, reason: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    if done.returncode != 1 or len(lines) != 1 or reason not in lines[0]:
        problems.append(f"{what}: exit {done.returncode}, {done.stderr!r}")
    left = sorted(path.name for path in place.iterdir())
    if left not in (["m.gguf"], ["filler", "m.gguf"]) or (place / "m.gguf").read_bytes() != OLD:
        problems.append(f"{what}: the folder holds {left}")


@click.command()
def main() -> None:
    """Export onto full and read-only disks: one line, exit code 1, no debris, the old file kept."""
    from tests.models import SMALL, write_small

    problems: list[str] = []
    full = 0
    with tempfile.TemporaryDirectory() as scratch:
        source = write_small(Path(scratch) / "ckpt", SMALL, 256)
        place = Path(scratch) / "mnt"
        place.mkdir()
        export(source, Path(scratch) / "whole.gguf")
        size = (Path(scratch) / "whole.gguf").stat().st_size
        for share in (0.0, 0.005, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            mount(place, f"size={2 * size // 4096 * 4}k")
            try:
                (place / "m.gguf").write_bytes(OLD)
                filler = 2 * size // 4096 * 4096 - 8192 - int(share * size)
                (place / "filler").write_bytes(bytes(filler))
                check(problems, f"{share:.1%} of {size} bytes free", export(source, place / "m.gguf"), place, "No space left on device; nothing was left behind")  # fmt: skip
                full += 1
            finally:
                subprocess.run(["umount", str(place)], check=True)
        mount(place, "size=8m")
        try:
            (place / "m.gguf").write_bytes(OLD)
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            check(problems, "read-only", export(source, place / "m.gguf"), place, "Read-only file system; nothing was left behind")  # fmt: skip
        finally:
            subprocess.run(["umount", str(place)], check=True)
    print(json.dumps({"full_disks": full, "read_only": 1, "problems": problems, "ok": not problems}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run_command(main, "scripts/faults/disk.py")
