"""What a registered model carries besides its weights: enough to build it, feed it, read its answers and trace it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import ImageConfig, ModelConfig, TaskConfig, read_json
from pipeline.errors import InputError

CARD, WEIGHTS, RAW = "model.json", "model.safetensors", "raw.safetensors"


class ScoredData(BaseModel):
    """The data that `metrics` were measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    digest: str  # SHA-256
    samples: int


class ModelCard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    task: TaskConfig
    model: ModelConfig
    image: ImageConfig
    eval_batch_size: int
    classes: list[str]
    averaged: bool = False
    """model.safetensors is a moving average of the weights; raw.safetensors, beside it, are the weights themselves."""
    metrics: dict[str, float | None]
    """Of model.safetensors; None where a number was not finite."""
    scored: ScoredData | None = None
    sha256: dict[str, str]
    """Digests of the weights' files by name, as they were when training saved them."""
    lineage: dict[str, str]
    """Where it comes from, each entry also a tag of the version: run (the run's UUID), step, config (fingerprint), code
    (revision), data (digest), parent (the version that training started from), source (of foreign weights)."""

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """Raises OSError and InputError."""
        return read_json(cls, folder / CARD)

    def require_head(self, model: str) -> None:
        """Raises InputError, which names the `model`, for a backbone that was imported without a head."""
        if not self.classes:
            raise InputError(
                f"{model}: is a backbone without a head, so it names no classes: start fine-tuning from it "
                f"(launch/finetune.py --set init.model={model}), or score its features (launch/evaluate.py --probe)"
            )

    def write(self, folder: Path) -> None:
        files.write(folder / CARD, self.model_dump_json(indent=1).encode() + b"\n")
