"""Runs files written by `tmexport onnx` in an old onnxruntime: does it load them, and does it give this release's logits?

    python -m venv old && old/bin/pip install "onnxruntime==1.15.0" "numpy<2"
    python scripts/peers/old_ort.py --python old/bin/python portable.onnx custom.onnx

Each file gets 70 tokens at once and then 3 one by one, its state carried by hand, in this Python's onnxruntime and in the
other's. The last line on stdout is JSON; exit code 1 if a file does not run there or its logits differ by more than 2 % of
their spread (the ort form; the others: 0.001 %).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tmexport.cli.app import run_command

# Runs in the other Python, which has numpy and onnxruntime only.
_CHILD = """
import json, sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
config = json.load(open(sys.argv[2]))
state = {s["input"]: np.zeros([1 if d == "batch" else d for d in s["shape"]], np.float32) for s in config["state"]}
names, logits = [o.name for o in session.get_outputs()], []
ids = np.random.default_rng(0).integers(0, config["model"]["vocab_size"], 73)
for part in (ids[:70], ids[70:71], ids[71:72], ids[72:]):
    results = dict(zip(names, session.run(names, {"input_ids": part[None], **state})))
    logits.append(results["logits"][0, -1])
    state = {s["input"]: results[s["output"]] for s in config["state"]}
np.save(sys.argv[3], np.stack(logits))
print(ort.__version__)
"""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--python", "other", required=True, help="The Python with the old onnxruntime.")
def main(files: tuple[Path, ...], other: str) -> None:
    """Compare FILES, written by `tmexport onnx` with their config beside them, in two versions of onnxruntime."""
    import numpy as np

    rows = []
    for file in files:
        config = file.with_name(f"{file.stem}.config.json")
        form, logits, versions, error = json.loads(config.read_text())["form"], [], [], ""
        with tempfile.TemporaryDirectory() as scratch:
            for python in (sys.executable, other):
                out = Path(scratch) / "logits.npy"
                command = [python, "-c", _CHILD, str(file), str(config), str(out)]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode:
                    error = result.stderr.strip().splitlines()[-1][:300]
                    break
                logits.append(np.load(out))
                versions.append(result.stdout.strip())
        difference = float(np.abs(logits[1] - logits[0]).max() / np.ptp(logits[0])) if len(logits) == 2 else None
        ok = difference is not None and difference < (0.02 if form == "ort" else 1e-5)
        rows.append({"file": str(file), "form": form, "versions": versions, "difference": difference, "error": error, "ok": ok})  # fmt: skip
        click.echo(f"{file}: {form}, onnxruntime {' and '.join(versions)}: {error or f'difference {difference:.2g} of the spread'}")  # fmt: skip
    click.echo(json.dumps({"ok": all(row["ok"] for row in rows), "files": rows}))
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    run_command(main, "scripts/peers/old_ort.py")
