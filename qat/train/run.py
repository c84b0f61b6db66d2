"""What a training run is given, and where it keeps what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from qat.data import Batches
from qat.model import LanguageModel
from qat.recipe import Recipe
from qat.train.teacher import Teacher
from qat.train.teacher_cache import TeacherCache
from tmexport.documents import Document


@dataclass
class Run:
    """Everything a training run needs. `held_out`: the documents that are scored while it trains."""

    recipe: Recipe
    student: LanguageModel
    teacher: Teacher | None
    batches: Batches
    bytes_per_token: float
    folder: Path
    eos: int
    tokenizer: Path
    table: str = "student"  # what recipe.toml calls the settings
    teacher_cache: TeacherCache | None = None
    held_out: Sequence[Document] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)  # digests of what is read, by flag; see load_state
    accelerator: Accelerator = field(default_factory=Accelerator)

    @property
    def latest(self) -> Path:
        return self.folder / "checkpoints" / "latest.pt"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.pt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"
