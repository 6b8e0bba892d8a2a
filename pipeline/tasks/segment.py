"""Semantic segmentation with Semantic FPN: a class for each pixel.

    crops ──network──▶ logits at stride 4 ──x4──▶ cross-entropy of each pixel ──▶ loss of each crop
    whole images, padded ──network──▶ logits ──x4, cut to the image, resized to its own size──▶ classes ──▶ confusion

N images, K classes; the network's input is H x W, the canvas; an image's own size is h x w.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.feed.loader import MicroBatch
from pipeline.feed.task_transforms import MaskTarget
from pipeline.shards.images import IGNORED
from pipeline.tasks.classify import drop_path_of
from pipeline.tasks.layer_groups import layers
from pipeline.world import World
from pvt.dense import PREFIX
from pvt.model import STRIDES
from pvt.semantic_fpn import SemanticFpn


class SegmentationTask:
    """Cross-entropy of each pixel; mIoU, mAcc, aAcc and the loss as metrics."""

    main_metric = "miou"
    chance_loss = None  # depends on how many pixels are labelled

    def __init__(self, model: SemanticFpn, classes: list[str]) -> None:
        assert model.num_classes == len(classes)
        self.model = model
        self.classes = classes
        self.drop_path_rates = model.drop_path_rates

    @property
    def depths(self) -> dict[str, int]:
        return layers(self.model.backbone, PREFIX)

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Of images [N, 3, H, W] with targets [N, H, W]: [N], see `pixel_loss`."""
        height, width = batch.targets.shape[-2:]
        return pixel_loss(_to_canvas(self.outputs(model, batch))[..., :height, :width], batch.targets)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Logits [N, K, H/4, W/4]."""
        return model(batch.images, **drop_path_of(batch))

    def metric(self) -> "SegmentationMetric":
        return SegmentationMetric(len(self.classes))


class SegmentationMetric:
    """Counts pixels by true and predicted class, in integers. Images are scored at their own size."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion: Tensor | None = None
        """[K, K] int64, of this rank: row the true class, column the predicted one."""
        self._sums = torch.zeros(2, dtype=torch.float64)  # images, loss

    def update(self, outputs: Tensor, targets: list[MaskTarget], weights: Tensor) -> None:
        """`outputs`: logits [N, K, H/4, W/4]. Of an image without weight, the target is not looked at."""
        confusion = torch.zeros(self.num_classes**2, dtype=torch.int64, device=outputs.device)
        for logits, target, weight in zip(outputs, targets, weights.tolist(), strict=True):
            if not weight:
                continue
            scores = _to_image(logits, target)
            truth = target.labels.to(scores.device).long()
            self._sums += torch.stack([torch.ones(()), pixel_loss(scores[None], truth[None])[0].cpu()])
            labelled = truth != IGNORED
            pairs = truth[labelled] * self.num_classes + scores.argmax(dim=0)[labelled]
            confusion += torch.bincount(pairs, minlength=self.num_classes**2)
        confusion = confusion.view(self.num_classes, self.num_classes)
        self.confusion = confusion if self.confusion is None else self.confusion + confusion

    def result(self, world: World) -> dict[str, float]:
        own = torch.zeros(self.num_classes**2) if self.confusion is None else self.confusion.flatten()
        # float64 holds counts of pixels up to 9e15 exactly, and not every backend sums integers.
        message = torch.cat([own.double(), self._sums.to(own.device)]).to(world.device)
        *counts, images, loss = world.sum(message).tolist()
        confusion = torch.tensor(counts, dtype=torch.float64).view(self.num_classes, self.num_classes)
        if not confusion.any():
            raise InputError(
                "data.val has no labelled pixel: a score needs label maps with other values than 0 and 255"
            )
        return {
            "miou": class_ious(confusion).nanmean().item(),
            "macc": (confusion.diag() / confusion.sum(dim=1)).nanmean().item(),
            "aacc": (confusion.diag().sum() / confusion.sum()).item(),
            "val_loss": loss / images,
        }


def class_ious(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, [K] float64, of `SegmentationMetric.confusion`. NaN for a class that is
    neither there nor predicted."""
    confusion = confusion.double()
    intersection = confusion.diag()
    return intersection / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


def predict(logits: Tensor, target: MaskTarget) -> Tensor:
    """One image's logits [K, H/4, W/4] -> classes [h, w] int64, at the size of the target's labels."""
    return _to_image(logits, target).argmax(dim=0)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, [N] float32: of each image the sum over its labelled pixels divided by the number of all.

    So a crop with few labelled pixels weighs little, as in the published code's average over a batch. Logits
    [N, K, H, W] float32, targets [N, H, W] of classes or IGNORED.
    """
    # A list of pixels, because on CUDA the kernel for maps is not deterministic.
    pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # [N*H*W, K]
    losses = functional.cross_entropy(pixels, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape[0], -1).mean(dim=1)


def _to_canvas(logits: Tensor) -> Tensor:
    """Logits [N, K, H/4, W/4] -> [N, K, H, W] float32."""
    return functional.interpolate(logits.float(), scale_factor=STRIDES[0], mode="bilinear", align_corners=False)


def _to_image(logits: Tensor, target: MaskTarget) -> Tensor:
    """One image's logits [K, H/4, W/4] -> [K, h, w] float32, without the canvas around it."""
    height, width = target.extent
    seen = _to_canvas(logits[None])[..., :height, :width]
    return functional.interpolate(seen, size=target.labels.shape, mode="bilinear", align_corners=False)[0]
