"""Builds the network of a registered model."""

from pathlib import Path
from typing import Any

from pipeline.network import build, load_weights
from pipeline.track.model_card import ModelCard


def load_network(card: ModelCard, weights: Path) -> Any:
    """Returns the network in fp32 and evaluation mode. Raises InputError for weights that are not this network's."""
    network = build(card.task, card.model, card.image.size, len(card.classes))
    # Nobody trains these networks, and without gradients no operation keeps what a backward pass would need.
    network.eval().requires_grad_(False)
    load_weights(network, weights)
    return network
