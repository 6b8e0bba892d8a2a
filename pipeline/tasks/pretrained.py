"""Starting a network from the weights of another.

weights of a classifier ──load_backbone──▶ the backbone of a dense network, its head fresh
weights of its own kind ──load_pretrained─▶ the whole network, its head fresh where the classes differ
"""

import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pvt.dense import PREFIX, DenseNetwork


def load_pretrained(model: nn.Module, weights: Mapping[str, Tensor], source: str, *, keep_head: bool) -> None:
    """Start from the weights of a model that was trained on other data, with a fresh head unless it fits.

    Position embeddings are resized to the network's image size where the architecture knows how. Raises InputError
    where the tensors are not those of this architecture; `source` is named in it.
    """
    own: dict[str, Tensor] = model.state_dict()
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        weights = dict(filter_fn(weights, model) if filter_fn else weights)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:  # whatever timm makes of others' weights
        raise InputError(f"{source}: not weights of model.name {type(model).__name__}: {error}") from error
    if not keep_head:
        heads: Any = model.pretrained_cfg["classifier"]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        of_head = tuple(f"{head}." for head in heads)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(of_head)}
        weights |= {name: tensor for name, tensor in own.items() if name.startswith(of_head)}
    faults = [
        *(f"{name} is missing" for name in own.keys() - weights.keys()),
        *(f"{name} has no place" for name in weights.keys() - own.keys()),
        *(
            f"{name} is {list(weights[name].shape)} and not {list(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ),
    ]
    if faults:
        some = "; ".join(sorted(faults)[:3])
        raise InputError(f"{source} does not fit the model: {some} ({len(faults)} in all): choose its model.name")
    model.load_state_dict(weights)


def load_backbone(model: DenseNetwork, name: str, weights: Mapping[str, Tensor], source: str) -> None:
    """Start the backbone from the weights of a classifier, the timm model `name`, whatever its classes; or from those
    of another dense network on it.

    Position embeddings are resized where sizes differ. Raises InputError where the tensors are not those of this
    architecture; `source` is named in it.
    """
    with torch.device("meta"):
        classifier: nn.Module = timm.create_model(name)
    beyond = classifier.state_dict().keys() - model.backbone.state_dict().keys()
    inside = {key: tensor for key, tensor in weights.items() if key.startswith(PREFIX)}
    of_backbone = inside or {f"{PREFIX}{key}": tensor for key, tensor in weights.items() if key not in beyond}
    rest = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(PREFIX)}
    load_pretrained(model, {**of_backbone, **rest}, source, keep_head=True)
