"""The snippets of docs/serve.md run against a server."""

import os
import re
import subprocess
import sys

import pytest

from tests.demo.running import ROOT
from tests.models import SMALL, write_small

TEXT = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```(python|bash)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("language", "code"), SNIPPETS, ids=lambda value: value.split("\n")[0][:30])
def test_snippet_runs(server, tmp_path, language, code):
    write_small(tmp_path / "ckpt", SMALL, 64)
    code = code.replace("http://127.0.0.1:8080", server.url)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stdout


def test_all_snippets_were_found():
    assert [language for language, _ in SNIPPETS] == ["bash", *["python"] * 5]
