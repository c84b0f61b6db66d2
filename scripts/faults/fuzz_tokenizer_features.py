"""Random tokenizer.json features: whenever one is exported without a warning, llama.cpp's tokens must equal the tokenizer's.

Usage: python scripts/faults/fuzz_tokenizer_features.py --seconds 1800 [--seed 1]

Needs xllamacpp. Cases run in child processes of 50 seeds, so that a crash of llama.cpp costs one child and is a finding. The
last line on stdout is one JSON object; exit code 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEEDS_A_CHILD = 50
LONGEST = 300  # seconds of a child


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the campaign [60]")
    parser.add_argument("--seed", type=int, default=1, help="the first seed [1]")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.seed)
    until, seed = time.monotonic() + options.seconds, options.seed
    began, counts, findings = time.monotonic(), Counter[str](), []
    while time.monotonic() < until:
        command = [sys.executable, __file__, "--child", "--seed", str(seed)]
        output, ended = run_child(command)
        lines = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("CASE ")]
        counts.update(verdict for _, verdict, _ in lines)
        findings += [line for line in lines if line[1] == "DIFFERENT"]
        if len(lines) < SEEDS_A_CHILD:
            findings.append([seed + len(lines), "CRASH", ended])
        for finding in findings[-3:]:
            print(finding, file=sys.stderr)
        seed += max(1, len(lines) + (len(lines) < SEEDS_A_CHILD))
    report = {
        "cases": sum(counts.values()),
        **counts,
        "seconds": round(time.monotonic() - began),
        "next_seed": seed,
        "findings": findings,
    }
    print(json.dumps(report))
    return 1 if findings else 0


def run_child(command: list[str]) -> tuple[str, str]:
    """What the child printed, and how it ended; one that hangs is ended."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode("utf-8", "replace"), f"no end after {LONGEST} s"
    return result.stdout, f"exit {result.returncode}: {result.stderr[-300:]}"


def child(first: int) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.tokenizer.random_features import check

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + SEEDS_A_CHILD):
            verdict, what = check(seed, Path(folder))
            print("CASE " + json.dumps([seed, verdict, what]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
