"""The backbone, and the weights that a fine-tuning run starts from."""

import re

from pydantic import Field, field_validator

from pipeline.config.fields import BelowOne, Fraction
from pipeline.config.section import Section


class ModelConfig(Section):
    """The backbone, a timm model. The task adds its head."""

    name: str
    """Name of a timm model: pvt_pico, pvt_tiny, pvt_small, pvt_medium, pvt_large or any other."""
    image_size: int | None = Field(default=None, gt=0)
    """Image size, in pixels a side, of the position embeddings in a dense task's backbone; they are interpolated to the
    size of each image. None: image.size. A classifier always takes image.size."""
    drop_rate: Fraction = 0.0
    """Dropout probability before a classifier's last layer. Dense tasks have settings of their own."""
    drop_path_rate: BelowOne = 0.0
    """Stochastic depth: drop probability of the last residual branches; it grows linearly from 0 over the blocks."""
    grad_checkpointing: bool = False
    """Recomputes the blocks' activations in the backward pass instead of keeping them: less memory, slower steps."""
    frozen_stages: int = Field(default=0, ge=0)
    """Freezes the first N stages, counted from the stem, at the weights of init.model. Where the backbone has no more
    than N stages, all of it is frozen, and only the task's head is trained."""
    frozen_statistics: bool = False
    """Freezes the running statistics of all BatchNorm layers at those of init.model: the few images in a dense task's
    batch estimate them poorly."""


class InitConfig(Section):
    """The registered model that a fine-tuning run starts from."""

    model: str
    """The model's URI, models:/NAME/VERSION or models:/NAME@ALIAS. The run takes over its backbone, and its head where
    task and classes are the same."""

    @field_validator("model")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if not re.fullmatch(r"models:/[^/@]+(/[0-9]+|@.+)", value):
            raise ValueError("a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
        return value
