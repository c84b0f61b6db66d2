"""Running scripts/demo/demo.py as a user does."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class DemoRun:
    """One run of scripts/demo/demo.py: exit code, stdout, stderr, and the folder it wrote."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def last_line(self) -> dict:
        return json.loads(self.stdout.strip().split("\n")[-1])


def run_demo(out: Path, *args: str) -> DemoRun:
    command = [sys.executable, "scripts/demo/demo.py", "--scale", "tiny", "--out", str(out), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    return DemoRun(done.returncode, done.stdout, done.stderr, out)
