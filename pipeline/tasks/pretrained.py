"""Starts a network from the weights of another.

weights of a classifier    ──load_backbone───▶ the backbone of a dense network, whose head stays fresh
weights of the same network ──load_pretrained──▶ the network, whose head stays fresh where the classes differ
"""

import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pvt.dense import PREFIX, DenseNetwork


def load_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    keep_head: bool,
) -> None:
    """Loads the weights of a model that was trained on other data, without its head unless `keep_head`.

    Position embeddings are resized to the network's image size where the architecture knows how. Raises InputError,
    which names `source`, for tensors of another architecture.
    """
    own: dict[str, Tensor] = model.state_dict()
    # timm's models have this function in their module, for checkpoints of other layouts and image sizes.
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        weights = dict(filter_fn(weights, model) if filter_fn else weights)
    # What timm's filters raise for weights of another architecture is not defined.
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise InputError(f"{source}: not weights of model.name {type(model).__name__}: {error}") from error
    if not keep_head:
        heads: Any = model.pretrained_cfg["classifier"]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        if isinstance(heads, str):
            heads = (heads,)
        of_head = tuple(f"{head}." for head in heads)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(of_head)}
        weights |= {name: tensor for name, tensor in own.items() if name.startswith(of_head)}
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} has no place" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        shape, own_shape = list(weights[name].shape), list(own[name].shape)
        if shape != own_shape:
            faults.append(f"{name} is {shape} and not {own_shape}")
    if faults:
        some = "; ".join(sorted(faults)[:3])
        raise InputError(f"{source} does not fit the model: {some} ({len(faults)} in all): choose its model.name")
    model.load_state_dict(weights)


def load_backbone(
    model: DenseNetwork,
    name: str,
    weights: Mapping[str, Tensor],
    source: str,
) -> None:
    """Loads the backbone from the weights of a classifier, the timm model `name`, with any classes; or from those of
    another dense network with this backbone.

    Position embeddings are resized where sizes differ. Raises InputError, which names `source`, for tensors of another
    architecture.
    """
    # A complete classifier on the meta device shows which tensors a pruned backbone does not have.
    with torch.device("meta"):
        classifier: nn.Module = timm.create_model(name)
    pruned = classifier.state_dict().keys() - model.backbone.state_dict().keys()
    backbone = {key: tensor for key, tensor in weights.items() if key.startswith(PREFIX)}
    # Without the prefix they are a classifier's.
    if not backbone:
        backbone = {f"{PREFIX}{key}": tensor for key, tensor in weights.items() if key not in pruned}
    own_head = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(PREFIX)}
    load_pretrained(model, {**backbone, **own_head}, source, keep_head=True)
