"""What a registered model carries besides its weights: enough to build it, feed it and read its answers."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline import config

CARD, WEIGHTS = "model.json", "model.safetensors"


class Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    task: Literal["classification"]
    model: config.Model
    image: config.Image
    eval_batch_size: int
    classes: list[str]
    metrics: dict[str, float | None]
    lineage: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Card":
        return cls.model_validate(json.loads((folder / CARD).read_text()))

    def write(self, folder: Path) -> None:
        (folder / CARD).write_text(self.model_dump_json(indent=1) + "\n")
