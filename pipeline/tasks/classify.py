"""Image classification: the pretraining task, and the first of the fine-tuning tasks."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import config, network
from pipeline.errors import InputError
from pipeline.tasks.layers import layers
from pipeline.world import World


def build_model(model: config.Model, image_size: int, num_classes: int) -> nn.Module:
    """The classifier that a configuration names. Raises InputError as network.build does."""
    return network.build(config.Classification(), model, image_size, num_classes)


def load_pretrained(model: nn.Module, weights: Mapping[str, Tensor], source: str, *, keep_head: bool) -> None:
    """Start from the weights of a model that was trained on other data, with a fresh head unless it fits.

    Position embeddings are resized to the network's image size where the architecture knows how. Raises InputError
    where the tensors are not those of this architecture; `source` is named in it.
    """
    own: dict[str, Tensor] = model.state_dict()
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        weights = dict(filter_fn(weights, model) if filter_fn else weights)
    except ValueError as error:
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


def check_image_sizes(model: config.Model, image_size: int, num_classes: int, sizes: Iterable[int]) -> None:
    """Raise InputError for a size of the resolution schedule that the network does not take.

    The network, built for `image_size`, is run without memory for its weights or its results.
    """
    with torch.device("meta"), torch.inference_mode():
        built = build_model(model, image_size, num_classes).eval()
        for size in sizes:
            try:
                built(torch.empty(1, 3, size, size))
            except (ValueError, AssertionError, RuntimeError) as error:
                raise InputError(f"augment.image_size: {model.name} does not take {size}: {error}") from error


class Classification:
    """Soft-target cross-entropy; top-1, top-5 and the loss as metrics."""

    main_metric = "top1"

    def __init__(self, model: nn.Module, num_classes: int | None = None) -> None:
        """Without `num_classes` a collapse to guessing cannot be told from learning."""
        self.model = model
        self.chance_loss = math.log(num_classes) if num_classes and num_classes > 1 else None
        self.drop_path_rates: tuple[float, ...] = getattr(model, "drop_path_rates", ())

    @property
    def depths(self) -> dict[str, int]:
        return layers(self.model)

    def losses(self, model: nn.Module, images: Tensor, targets: Tensor, drop_path: Tensor | None) -> Tensor:
        logits = model(images) if drop_path is None else model(images, drop_path=drop_path)
        return -(targets * functional.log_softmax(logits.float(), dim=-1)).sum(dim=-1)

    def metric(self) -> "ClassificationMetric":
        return ClassificationMetric()


class ClassificationMetric:
    """Counts in float64, which is exact for any number of samples that fits on a disk."""

    def __init__(self) -> None:
        self._sums: Any = 0.0  # [4]: samples, right at first, right among five, loss

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        logits = outputs.float()
        best = logits.topk(min(5, logits.shape[1])).indices
        right = best == targets[:, None]
        loss = functional.cross_entropy(logits, targets, reduction="none")
        counts = torch.stack([torch.ones_like(loss), right[:, 0].float(), right.any(dim=1).float(), loss])
        self._sums = self._sums + (counts.double() * weights.double()).sum(dim=1)

    def result(self, world: World) -> dict[str, float]:
        samples, first, five, loss = world.sum(self._sums).tolist()
        return {"top1": first / samples, "top5": five / samples, "val_loss": loss / samples}
