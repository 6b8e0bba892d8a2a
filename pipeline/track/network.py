"""The network of a registered model."""

from pathlib import Path
from typing import Any

import safetensors.torch

from pipeline.network import build
from pipeline.track.card import Card


def load(card: Card, weights: Path) -> Any:
    """In fp32 and evaluation mode. Raises RuntimeError for weights that are not this network's."""
    network = build(card.task, card.model, card.image.size, len(card.classes)).eval().requires_grad_(False)
    network.load_state_dict(safetensors.torch.load_file(weights))
    return network
