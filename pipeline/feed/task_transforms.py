"""How a task's samples become what its network takes: the part of the feed that tasks choose.

header of an image ──views──▶ which part of it is seen, how large, on which canvas
annotation, view   ──target─▶ what the network is to say of that part; the view, where the annotation decides it
targets of a batch ──────────▶ what the loss or the metric is given
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import keys
from pipeline.config import AugmentConfig, DetectionConfig, ImageConfig, MaskRcnnConfig, SemanticFpnConfig, TaskConfig
from pipeline.errors import InputError
from pipeline.feed import augment, mixup
from pipeline.feed.augment import Views
from pipeline.feed.box_transforms import BoxTransform, require_masks
from pipeline.feed.transfer import to_device
from pipeline.shards.images import IGNORED, BadImageError, decode_map, wrong_labels
from pipeline.shards.index import CorruptSampleError, ShardSet

Array = npt.NDArray[Any]

Target = Callable[[bytes, Views], tuple[Views, Any]]
"""From one sample's annotation, its bytes at rest, and its view to the view, which the annotation may have changed, and
what the network is to say of it. Raises CorruptSampleError."""


class TaskTransform(Protocol):
    """Of n samples with heights and widths `hw` [n, 2]."""

    @property
    def training_target(self) -> Target | None:
        """None where samples have class labels and no annotations."""
        ...

    @property
    def evaluation_target(self) -> Target | None: ...

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views: ...

    def evaluation_views(self, hw: Array) -> Views: ...

    def training_batch(self, targets: Any, device: torch.device) -> Any:
        """For the loss, of what `training_target` made of the samples, or of class labels [n]."""
        ...

    def evaluation_batch(self, targets: Any, device: torch.device) -> Any:
        """For the metric, of what `evaluation_target` made, or of class labels."""
        ...

    def blank_batch(self, n: int, size: int, device: torch.device) -> Any:
        """For the loss, of samples that do not count."""
        ...


class LabelTransform:
    """Classification: random crops and soft labels in training, a central crop and class labels in evaluation."""

    training_target = evaluation_target = None

    def __init__(
        self,
        image: ImageConfig,
        num_classes: int,
        config: AugmentConfig | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self._image, self._num_classes = image, num_classes
        self._augment, self._label_smoothing = config or AugmentConfig(), label_smoothing

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.training_views(self._augment, self._image, size, key, hw)

    def evaluation_views(self, hw: Array) -> Views:
        return augment.evaluation_views(self._image, self._image.size, hw)

    def training_batch(self, targets: Array, device: torch.device) -> Tensor:
        """[n, K] float32."""
        (labels,) = to_device([targets], device)
        return mixup.soft_targets(labels, self._num_classes, self._label_smoothing)

    def evaluation_batch(self, targets: Array, device: torch.device) -> Tensor:
        """[n] int64."""
        (labels,) = to_device([targets], device)
        return labels

    def blank_batch(self, n: int, size: int, device: torch.device) -> Tensor:
        return torch.zeros(n, self._num_classes, device=device)


@dataclasses.dataclass(frozen=True)
class MaskTarget:
    """What an evaluated image shows, at its own resolution."""

    labels: Tensor
    """[h, w] uint8: classes from 0, or IGNORED."""
    extent: tuple[int, int]
    """Height and width in pixels of the canvas that the image fills, from the upper left."""


class MaskTransform:
    """Semantic segmentation: random crops of images and label maps in training, whole images in evaluation.

    At rest a map holds 0 where nothing is labelled, c + 1 for class c, and IGNORED.
    """

    def __init__(
        self,
        task: SemanticFpnConfig,
        image: ImageConfig,
        num_classes: int,
        config: AugmentConfig | None = None,
    ) -> None:
        self._task, self._image, self._num_classes = task, image, num_classes
        self._augment = config or AugmentConfig()

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.scaled_crops(self._augment, self._task, self._image, key, hw)

    def evaluation_views(self, hw: Array) -> Views:
        return augment.whole_views(self._task, self._image, hw)

    def training_target(self, annotation: bytes, view: Views) -> tuple[Views, Tensor]:
        """[S, S] uint8. Of the crops that the view allows, the first that is not nearly all of one class, or the
        last."""
        labels = self._labels(annotation)
        height, width = view.shape[0].tolist()
        for anchor in (view.anchor, *view.elsewhere.swapaxes(0, 1)):
            view = dataclasses.replace(view, anchor=anchor)
            top, left = anchor[0].tolist()
            if self._is_varied(labels[top : top + height, left : left + width]):
                break
        target = np.full(view.canvas, IGNORED, np.uint8)
        rows, columns = view.nearest()
        target[: len(rows), : len(columns)] = labels[rows][:, columns]
        return view, torch.from_numpy(target)

    def evaluation_target(self, annotation: bytes, view: Views) -> tuple[Views, MaskTarget]:
        height, width = view.extent[0].tolist()
        return view, MaskTarget(torch.from_numpy(self._labels(annotation)), (height, width))

    def training_batch(self, targets: list[Tensor], device: torch.device) -> Tensor:
        """[n, S, S] int64."""
        (labels,) = to_device([torch.stack(targets).numpy()], device)
        return labels.long()

    def evaluation_batch(self, targets: list[MaskTarget], device: torch.device) -> list[MaskTarget]:
        labels = to_device([target.labels.numpy() for target in targets], device)
        return [MaskTarget(each, target.extent) for each, target in zip(labels, targets, strict=True)]

    def blank_batch(self, n: int, size: int, device: torch.device) -> Tensor:
        return torch.full((n, size, size), IGNORED, device=device)

    def _labels(self, annotation: bytes) -> npt.NDArray[np.uint8]:
        try:
            stored = decode_map(annotation)
        except BadImageError as error:
            raise CorruptSampleError(f"its label map: {error}") from error
        if wrong := wrong_labels(stored, self._num_classes):
            raise CorruptSampleError(f"its label map has {wrong}")
        labels = stored - np.uint8(1)  # 0 becomes IGNORED
        labels[stored == IGNORED] = IGNORED
        return labels

    def _is_varied(self, crop: npt.NDArray[np.uint8]) -> bool:
        counts = np.bincount(crop.ravel(), minlength=IGNORED + 1)[:IGNORED]
        return bool(np.count_nonzero(counts) > 1 and counts.max() <= self._task.max_class_fraction * counts.sum())


def task_transform(
    task: TaskConfig,
    image: ImageConfig,
    num_classes: int,
    config: AugmentConfig | None = None,
    label_smoothing: float = 0.0,
) -> TaskTransform:
    """Evaluation needs no more than a task, its images and the number of its classes."""
    if isinstance(task, SemanticFpnConfig):
        return MaskTransform(task, image, num_classes, config)
    if isinstance(task, DetectionConfig):
        return BoxTransform(task, image, num_classes, config)
    return LabelTransform(image, num_classes, config, label_smoothing)


def require_kind(task: TaskConfig, shards: ShardSet) -> None:
    """Raise InputError for data of another kind than the task's."""
    needed = None
    if isinstance(task, SemanticFpnConfig):
        needed = "semantic"
    elif isinstance(task, DetectionConfig):
        needed = "objects"
    if shards.annotations != needed:
        kinds = {None: "labelled images", "semantic": "images with label maps", "objects": "images with objects"}
        raise InputError(
            f"{shards.url(0)}: its data set holds {kinds[shards.annotations]}, but task {task.name} needs "
            f"{kinds[needed]}: set task, or name other data"
        )
    if isinstance(task, MaskRcnnConfig):
        require_masks(shards)
