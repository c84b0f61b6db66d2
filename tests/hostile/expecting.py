"""What hostile tests expect: a refusal in one line, an old file that is still there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.builders import Gguf
from tests.hostile.targets import read_gguf
from tmexport.errors import GGUFError

OLD = b"the old file"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def refused(tmp_path, data: bytes | Gguf, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data.build() if isinstance(data, Gguf) else data)
    with pytest.raises(GGUFError, match=message) as caught:
        read_gguf(path)
    text = str(caught.value)
    assert text.startswith(str(path)) or "weight" in text
    assert text.isprintable()
