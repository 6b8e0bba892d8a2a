"""The backbone, and what a fine-tuning run starts from."""

import re

from pydantic import Field, field_validator

from pipeline.config.fields import BelowOne, Fraction
from pipeline.config.section import Section


class ModelConfig(Section):
    """The backbone, a timm model, to which the task adds its head."""

    name: str
    """pvt_pico, pvt_tiny, pvt_small, pvt_medium or pvt_large; or any other timm model."""
    image_size: int | None = Field(default=None, gt=0)
    """Pixels that the position embeddings of a dense task's backbone are for; they are resized to each image's. None:
    image.size."""
    drop_rate: Fraction = 0.0
    drop_path_rate: BelowOne = 0.0
    grad_checkpointing: bool = False
    frozen_stages: int = Field(default=0, ge=0)
    """So many of its stages, from the stem on, keep the weights that they start from. As many as there are, or more:
    the whole backbone does, and the task's head alone is trained."""
    frozen_statistics: bool = False
    """Batch norms of all stages keep the statistics that they start from: a dense task's few images make poor ones."""


class InitConfig(Section):
    """What a fine-tuning run starts from."""

    model: str
    """models:/NAME/VERSION or models:/NAME@ALIAS. Its backbone is taken, and its head where the classes are the
    same."""

    @field_validator("model")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if not re.fullmatch(r"models:/[^/@]+(/[0-9]+|@.+)", value):
            raise ValueError("a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
        return value
