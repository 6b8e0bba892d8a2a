"""Image classification: the pretraining task, and the first of the fine-tuning tasks."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import network
from pipeline.config import ClassificationConfig, ModelConfig
from pipeline.errors import InputError
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.layer_groups import layers
from pipeline.world import World


def build_model(model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    """The classifier that a configuration names. Raises InputError as network.build does."""
    return network.build(ClassificationConfig(), model, image_size, num_classes)


def check_image_sizes(model: ModelConfig, image_size: int, num_classes: int, sizes: Iterable[int]) -> None:
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


def drop_path_of(batch: MicroBatch) -> dict[str, Tensor]:
    """As arguments of a network, which may not know of such masks."""
    return {} if batch.drop_path is None else {"drop_path": batch.drop_path}


class ClassificationTask:
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

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        logits = self.outputs(model, batch)
        return -(batch.targets * functional.log_softmax(logits.float(), dim=-1)).sum(dim=-1)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Logits [N, K]."""
        return model(batch.images, **drop_path_of(batch))

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
