"""Semantic segmentation with Semantic FPN: a class for each pixel.

    crops ──network──▶ logits at stride 4 ──x4──▶ cross-entropy of each pixel ──▶ loss of each crop
    whole images, padded ──network──▶ logits ──x4, cut to the image, resized to its own size──▶ classes ──▶ confusion

N images, K classes; the network's input is H x W, the canvas; an image's own size is h x w.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.answers import AnswerOptions, Seen, class_map, segmentation_row
from pipeline.errors import InputError
from pipeline.evaluation_view import resize_to_canvas, resize_to_image
from pipeline.feed.loader import MicroBatch
from pipeline.feed.task_transforms import MaskTarget
from pipeline.shards.images import IGNORED
from pipeline.tasks.classify import drop_path_of
from pipeline.tasks.dense import DenseTask
from pipeline.world import World


class SegmentationTask(DenseTask):
    """Cross-entropy of each pixel as the loss; mIoU, mAcc, aAcc and the loss as metrics."""

    main_metric = "miou"

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns the loss of each image, [N], for images [N, 3, H, W] with targets [N, H, W]. See `pixel_loss`."""
        height, width = batch.targets.shape[-2:]
        logits = resize_to_canvas(self.outputs(model, batch))
        # The canvas is padded to a multiple of the network's stride.
        return pixel_loss(logits[..., :height, :width], batch.targets)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns logits [N, K, H/4, W/4]."""
        return model(batch.images, **drop_path_of(batch))

    def answers(
        self,
        outputs: Tensor,
        seen: Sequence[Seen],
        classes: Sequence[str],
        options: AnswerOptions,
    ) -> list[dict[str, Any]]:
        """Returns what logits [N, K, H/4, W/4] say about each image, see answers.py."""
        rows = []
        for logits, image in zip(outputs.float(), seen, strict=True):
            labels = class_map(logits, image.extent, image.size)
            rows.append(segmentation_row(labels.cpu().numpy(), classes))
        return rows

    def metric(self) -> "SegmentationMetric":
        """Returns a metric that has counted nothing yet."""
        return SegmentationMetric(len(self.classes))


class SegmentationMetric:
    """Counts pixels by true and predicted class, in integers. Images are scored at their own size."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion: Tensor | None = None
        """This rank's confusion matrix, [K, K] int64: rows are true classes, columns predicted ones."""
        # [2]: number of images, sum of losses.
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(
        self,
        outputs: Tensor,
        targets: list[MaskTarget],
        weights: Tensor,
    ) -> None:
        """Counts a batch: logits [N, K, H/4, W/4], targets and weights. The target of a weight of 0 is not read."""
        num_pairs = self.num_classes**2
        confusion = torch.zeros(num_pairs, dtype=torch.int64, device=outputs.device)
        for logits, target, weight in zip(outputs, targets, weights.tolist(), strict=True):
            if not weight:
                continue
            scores = resize_to_image(logits, target.extent, target.size)
            truth = target.labels.to(scores.device).long()
            loss = pixel_loss(scores[None], truth[None])[0]
            self._sums += torch.stack([torch.ones(()), loss.cpu()])
            labelled = truth != IGNORED
            # True and predicted class as one number, which bincount counts.
            pairs = truth[labelled] * self.num_classes + scores.argmax(dim=0)[labelled]
            confusion += torch.bincount(pairs, minlength=num_pairs)
        confusion = confusion.view(self.num_classes, self.num_classes)
        if self.confusion is not None:
            confusion = self.confusion + confusion
        self.confusion = confusion

    def result(self, world: World) -> dict[str, float]:
        """Returns the metrics over the images of all ranks. Collective. Raises InputError without a labelled pixel."""
        # A rank of few images may have seen no batch.
        own = torch.zeros(self.num_classes**2)
        if self.confusion is not None:
            own = self.confusion.flatten()
        # float64 holds counts of pixels up to 9e15 exactly, and not every backend sums integers.
        message = torch.cat([own.double(), self._sums.to(own.device)])
        *counts, images, loss = world.sum(message.to(world.device)).tolist()
        confusion = torch.tensor(counts, dtype=torch.float64)
        confusion = confusion.view(self.num_classes, self.num_classes)
        if not confusion.any():
            raise InputError(
                "data.val has no labelled pixel: a score needs label maps with other values than 0 and 255"
            )
        correct = confusion.diag()
        return {
            "miou": class_ious(confusion).nanmean().item(),
            "macc": (correct / confusion.sum(dim=1)).nanmean().item(),
            "aacc": (correct.sum() / confusion.sum()).item(),
            "val_loss": loss / images,
        }


def class_ious(confusion: Tensor) -> Tensor:
    """Returns the intersection over union of each class, [K] float64, from a confusion matrix [K, K].

    It is NaN for a class that is neither in the data nor predicted.
    """
    confusion = confusion.double()
    intersection = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return intersection / union


def predict(logits: Tensor, target: MaskTarget) -> Tensor:
    """Returns the classes [h, w] int64 of one image's logits [K, H/4, W/4], at the size of the target's labels."""
    return resize_to_image(logits, target.extent, target.size).argmax(dim=0)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each image, [N] float32: the cross-entropies of its labelled pixels over the number of all.

    So a crop with few labelled pixels weighs little, as in the published code's average over a batch. Logits
    [N, K, H, W] float32, targets [N, H, W] of classes or IGNORED.
    """
    # A list of pixels, because on CUDA the kernel for maps is not deterministic.
    pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # [N*H*W, K]
    losses = functional.cross_entropy(
        pixels,
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view(targets.shape[0], -1).mean(dim=1)
