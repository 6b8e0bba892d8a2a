"""How a task's samples become the inputs and targets of its network: the part of the feed that tasks choose.

size of an image   ──views──▶ which part of it is seen, how large, on which canvas
annotation, view   ──target─▶ the target for that part; the view, where the annotation decides it
targets of a batch ──────────▶ the targets in the form that the loss or the metric takes
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import keys
from pipeline.config import AugmentConfig, ImageConfig, SemanticFpnConfig, TaskConfig
from pipeline.evaluation_view import Size
from pipeline.feed import augment, mixup
from pipeline.feed.augment import Views
from pipeline.feed.box_transforms import BoxTransform, require_masks
from pipeline.feed.transfer import to_device
from pipeline.shards.images import IGNORED, BadImageError, decode_map, wrong_labels
from pipeline.shards.index import CorruptSampleError, SampleSource
from pipeline.shards.open_data import require_kind

Array = npt.NDArray[Any]

Target = Callable[[bytes, Views], tuple[Views, Any]]
"""A function of one sample's annotation, the bytes as they are stored, and its view. It returns the view, which the
annotation may have changed, and the target for it. It raises CorruptSampleError."""


class EvaluationTransform(Protocol):
    """How a task sees n samples with heights and widths `hw` [n, 2] in evaluation."""

    @property
    def evaluation_target(self) -> Target | None:
        """None where samples have class labels and no annotations."""
        ...

    def evaluation_views(self, hw: Array) -> Views: ...

    def evaluation_batch(self, targets: Any, device: torch.device) -> Any:
        """Returns a batch's targets for the metric, from those of `evaluation_target` or from class labels [n]."""
        ...


class TaskTransform(EvaluationTransform, Protocol):
    """How a task sees samples in training, too."""

    @property
    def training_target(self) -> Target | None:
        """None where samples have class labels and no annotations."""
        ...

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views: ...

    def training_batch(self, targets: Any, device: torch.device) -> Any:
        """Returns a batch's targets for the loss, from those of `training_target` or from class labels [n]."""
        ...

    def blank_batch(self, n: int, size: int, device: torch.device) -> Any:
        """Returns targets for the loss of n samples that do not count."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelTransform:
    """Classification: random crops and soft labels in training, a central crop and class labels in evaluation."""

    training_target = None
    evaluation_target = None

    task: TaskConfig
    image: ImageConfig
    num_classes: int
    config: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.training_views(
            self.config,
            self.image,
            size,
            key,
            hw,
        )

    def evaluation_views(self, hw: Array) -> Views:
        return augment.evaluation_views(self.image, self.image.size, hw)

    def training_batch(self, targets: Array, device: torch.device) -> Tensor:
        """Returns soft labels, [n, K] float32."""
        (labels,) = to_device([targets], device)
        return mixup.soft_targets(
            labels,
            self.num_classes,
            self.label_smoothing,
        )

    def evaluation_batch(self, targets: Array, device: torch.device) -> Tensor:
        """Returns class labels, [n] int64."""
        (labels,) = to_device([targets], device)
        return labels

    def blank_batch(
        self,
        n: int,
        size: int,
        device: torch.device,
    ) -> Tensor:
        return torch.zeros(n, self.num_classes, device=device)


@dataclasses.dataclass(frozen=True)
class MaskTarget:
    """The classes of an evaluated image's pixels, at the image's own resolution."""

    # [h, w] uint8: classes from 0, or IGNORED.
    labels: Tensor
    # Height and width in pixels of the canvas that the image fills, from the upper left.
    extent: Size

    @property
    def size(self) -> Size:
        """The image's own height and width."""
        height, width = self.labels.shape
        return height, width


@dataclasses.dataclass(frozen=True)
class MaskTransform:
    """Semantic segmentation: random crops of images and label maps in training, whole images in evaluation.

    A stored map holds 0 where nothing is labelled, c + 1 for class c, and IGNORED.
    """

    task: SemanticFpnConfig
    image: ImageConfig
    num_classes: int
    config: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0
    """Always 0: the configuration refuses mix.label_smoothing with a dense task."""

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.scaled_crops(
            self.config,
            self.task,
            self.image,
            key,
            hw,
        )

    def evaluation_views(self, hw: Array) -> Views:
        return augment.whole_views(self.task, self.image, hw)

    def training_target(self, annotation: bytes, view: Views) -> tuple[Views, Tensor]:
        """Returns a crop's labels, [S, S] uint8. Of the crops that the view allows it is the first that is not nearly
        all of one class, or the last."""
        labels = self._decode_labels(annotation)
        height, width = view.shape[0].tolist()
        for anchor in (view.anchor, *view.other_anchors.swapaxes(0, 1)):
            view = dataclasses.replace(view, anchor=anchor)
            top, left = anchor[0].tolist()
            crop = labels[top : top + height, left : left + width]
            if self._is_varied(crop):
                break
        # The padding is ignored.
        target = np.full(view.canvas, IGNORED, np.uint8)
        rows, columns = view.nearest()
        target[: len(rows), : len(columns)] = labels[rows][:, columns]
        return view, torch.from_numpy(target)

    def evaluation_target(self, annotation: bytes, view: Views) -> tuple[Views, MaskTarget]:
        labels = torch.from_numpy(self._decode_labels(annotation))
        height, width = view.extent[0].tolist()
        return view, MaskTarget(labels, (height, width))

    def training_batch(self, targets: list[Tensor], device: torch.device) -> Tensor:
        """Returns labels, [n, S, S] int64."""
        # They travel as bytes, and become 8 times as large on the device.
        (labels,) = to_device([torch.stack(targets).numpy()], device)
        return labels.long()

    def evaluation_batch(self, targets: list[MaskTarget], device: torch.device) -> list[MaskTarget]:
        arrays = [target.labels.numpy() for target in targets]
        batch = []
        for labels, target in zip(to_device(arrays, device), targets, strict=True):
            batch.append(MaskTarget(labels, target.extent))
        return batch

    def blank_batch(
        self,
        n: int,
        size: int,
        device: torch.device,
    ) -> Tensor:
        return torch.full((n, size, size), IGNORED, device=device)

    def _decode_labels(self, annotation: bytes) -> npt.NDArray[np.uint8]:
        """Returns classes from 0, or IGNORED, [h, w] of the stored image."""
        try:
            stored = decode_map(annotation)
        except BadImageError as error:
            raise CorruptSampleError(f"its label map: {error}") from error
        if wrong := wrong_labels(stored, self.num_classes):
            raise CorruptSampleError(f"its label map has {wrong}")
        # Unsigned 0 - 1 is IGNORED.
        labels = stored - np.uint8(1)
        labels[stored == IGNORED] = IGNORED
        return labels

    def _is_varied(self, crop: npt.NDArray[np.uint8]) -> bool:
        """Returns whether a crop shows two classes and none of them fills nearly all of it."""
        counts = np.bincount(crop.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) < 2:
            return False
        limit = self.task.max_class_fraction * counts.sum()
        return bool(counts.max() <= limit)


@dataclasses.dataclass(frozen=True)
class WithoutTargets:
    """What evaluation shows the network of images, of which nobody has said what is in them."""

    evaluation_target = None

    transform: TaskTransform

    def evaluation_views(self, hw: Array) -> Views:
        return self.transform.evaluation_views(hw)

    def evaluation_batch(self, targets: Array, device: torch.device) -> None:
        """Returns nothing in place of the labels."""


TRANSFORMS: dict[str, Callable[[Any, ImageConfig, int, AugmentConfig, float], TaskTransform]] = {
    "classification": LabelTransform,
    "semantic_fpn": MaskTransform,
    "retinanet": BoxTransform,
    "mask_rcnn": BoxTransform,
    "detr": BoxTransform,
}
"""What makes each task's transform from the task's section, the image's, the number of classes, the section `augment`
and mix.label_smoothing."""


def task_transform(
    task: TaskConfig,
    image: ImageConfig,
    num_classes: int,
    config: AugmentConfig | None = None,
    label_smoothing: float = 0.0,
) -> TaskTransform:
    """Returns the transform of a task. Evaluation does without the last two parameters."""
    return TRANSFORMS[task.name](task, image, num_classes, config or AugmentConfig(), label_smoothing)


def require_annotations(task: TaskConfig, shards: SampleSource) -> None:
    """Raises InputError for data of another kind than the task's."""
    require_kind(task, shards)
    if task.needs_masks:
        require_masks(shards)
