"""The network that a card describes: the one place where this room makes it.

card ──build──▶ network, freshly initialised ──load: weights of the card's files──▶ network in evaluation mode
"""

from pathlib import Path

import safetensors.torch
from torch import nn

from pipeline import config
from pipeline.track.card import Card
from pvt.create import create_model
from pvt.semantic_fpn import SemanticFpn, backbone


def build(card: Card) -> nn.Module:
    """With fresh weights, in training mode. From images [B, 3, H, W] it makes logits: for classification [B, K], for
    semantic_fpn [B, K, H / 4, W / 4]."""
    name, task, num_classes = card.model.name, card.task, len(card.classes)
    if isinstance(task, config.SemanticFpn):
        pyramid = backbone(name, card.model.image_size or card.image.size)
        return SemanticFpn(pyramid, num_classes, task.channels, task.dropout, task.pyramid_channels)
    return create_model(name, card.image.size, num_classes=num_classes)


def load(card: Card, weights: Path) -> nn.Module:
    """In fp32 and evaluation mode. Raises RuntimeError for weights that are not this network's."""
    network = build(card).eval().requires_grad_(False)
    network.load_state_dict(safetensors.torch.load_file(weights))
    return network
