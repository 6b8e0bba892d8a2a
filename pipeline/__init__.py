"""Streaming, fault-tolerant pretraining of vision backbones. docs/architecture.md is the map."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from pipeline.tasks.load_model import Preprocess


def load_model(uri: str, tracking_uri: str | None = None) -> "tuple[nn.Module, Preprocess]":
    """Returns a registered model, verified and in evaluation mode, and its preprocessing: see tasks/load_model.py."""
    # Imported late: whoever imports a part of this package needs no torch for it.
    from pipeline.tasks.load_model import load_model

    return load_model(uri, tracking_uri)
