"""The model card of a registered version: all that its users need, besides the weights, to build, feed and trace it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import AnyTaskConfig, ImageConfig, ModelConfig, read_json
from pipeline.errors import InputError

CARD = "model.json"
WEIGHTS = "model.safetensors"
RAW = "raw.safetensors"


class ScoredData(BaseModel):
    """The data set that `metrics` were measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    digest: str
    """SHA-256 of the data set."""
    samples: int


class ModelCard(BaseModel):
    """The content of model.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    task: AnyTaskConfig
    model: ModelConfig
    image: ImageConfig
    eval_batch_size: int
    classes: list[str]
    averaged: bool = False
    """Whether model.safetensors is a moving average of the weights. raw.safetensors, beside it, are the weights."""
    metrics: dict[str, float | None]
    """The metrics of model.safetensors; None stands for a number that was not finite."""
    scored: ScoredData | None = None
    sha256: dict[str, str]
    """SHA-256 digests of the weights' files by name, as training saved them."""
    lineage: dict[str, str]
    """Where the version comes from. Each entry is also a tag of the version: run (the run's UUID), step, config
    (fingerprint), code (revision), data (digest), parent (the version that training started from), source (of imported
    weights)."""

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """Reads the card in `folder`. Raises OSError and InputError."""
        return read_json(cls, folder / CARD)

    def require_head(self, model: str) -> None:
        """Raises InputError, which names the `model`, for a backbone that was imported without a head."""
        if not self.classes:
            raise InputError(
                f"{model}: is a backbone without a head, so it names no classes: start fine-tuning from it "
                f"(launch/finetune.py --set init.model={model}), or score its features (launch/evaluate.py --probe)"
            )

    def write(self, folder: Path) -> None:
        """Writes the card to `folder`."""
        files.write(folder / CARD, self.model_dump_json(indent=1).encode() + b"\n")
