"""What a registered model carries besides its weights: enough to build it, feed it and read its answers."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline import config

CARD, WEIGHTS = "model.json", "model.safetensors"


class Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    task: str
    model: config.Model
    image: config.Image
    eval_batch_size: int
    classes: list[str]
    metrics: dict[str, float]
    lineage: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Card":
        return cls.model_validate(json.loads((folder / CARD).read_text()))

    def write(self, folder: Path) -> None:
        (folder / CARD).write_text(self.model_dump_json(indent=1) + "\n")
