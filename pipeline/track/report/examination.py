"""What a run's network does with validation data: its confusion matrix, the scores of its classes, and pictures.

A classifier is counted by samples, a segmentation network by pixels: `Examination.counted`. A detector finds objects or
does not, so it has no confusion matrix.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from pipeline.track.report.render import number

_MOST_PAIRS = 20
_IMAGE_PX, _MAP_PX = 190, 112
"""How wide several images are shown at least, and how wide the stages' maps."""

Counts = npt.NDArray[np.int64]
Map = npt.NDArray[np.float32]
Row = list[str | Markup]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One validation image, what the network predicts for it, and what its stages see."""

    key: str
    headline: str
    verdict: str
    """Continues the headline."""
    images: Mapping[str, Image.Image]
    """The input, and label maps or objects on it, by name. Empty unless sample pictures were asked for."""
    maps: Mapping[str, Map]
    """[H, W] by the name of the stage."""

    @property
    def rows(self) -> list[tuple[list[tuple[str, Image.Image, str]], int]]:
        """The images with their names and sizes, and the width in pixels of each row's images."""
        images = [(name, image, "") for name, image in self.images.items()]
        maps = [(name, draw_map(each), f"{each.shape[0]} × {each.shape[1]}") for name, each in self.maps.items()]
        if len(images) < 2:
            return [([*images, *maps], _MAP_PX)]
        widest = max(image.width for image in self.images.values())
        return [(images, max(_IMAGE_PX, widest)), (maps, _MAP_PX)]


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a network does with validation data."""

    source: str
    """Which weights."""
    data: str
    num_samples: int
    """Samples of the data set."""
    num_examined: int
    is_whole: bool
    """Whether all samples were examined but for damaged ones."""
    classes: list[str]
    counted: Literal["samples", "pixels", "objects"]
    """What the network predicts the class of."""
    confusion: Counts
    """[K, K]: true class by predicted class; [0, 0] for objects."""
    class_scores: Mapping[str, Sequence[float] | Counts | npt.NDArray[np.float64]]
    """[K] by name: how many of each class there are, then scores, by the first of which classes are ranked."""
    scores: Mapping[str, float]
    pictures: Sequence[Picture]
    attribution: str | None = None
    """The credits that must stand beside the images."""
    legend: Sequence[tuple[str, str]] = ()
    """Classes and colours of the label maps that are shown."""


class Cell(NamedTuple):
    """A field of the confusion matrix."""

    text: str
    title: str
    share: float
    """Of the true class."""


def scores_of_classes(confusion: Counts, counted: str) -> dict[str, Counts | npt.NDArray[np.float64]]:
    """Returns `Examination.class_scores` of a confusion matrix: recall, and for pixels intersection over union."""
    right, sizes = confusion.diagonal(), confusion.sum(axis=1)
    union = sizes + confusion.sum(axis=0) - right
    recall = np.where(sizes > 0, right / np.maximum(1, sizes), np.nan)
    if counted == "samples":
        return {counted: sizes, "right": recall}
    overlap = np.where(union > 0, right / np.maximum(1, union), np.nan)
    return {counted: sizes, "IoU": overlap, "right": recall}


def class_rows(examined: Examination) -> list[Row]:
    """Returns the classes that were seen, worst first."""
    sizes, *scores = examined.class_scores.values()
    rows: list[Row] = []
    if not scores:
        return rows
    rank = np.asarray(scores[0], np.float64)
    for label in np.argsort(rank, kind="stable").tolist():
        if np.isfinite(rank[label]):
            shares = [number(float(values[label]), percent=True) for values in scores]
            rows.append([examined.classes[label], number(int(sizes[label])), *shares])
    return rows


def confusion_cells(examined: Examination) -> list[tuple[str, list[Cell]]]:
    """Returns the confusion matrix as rows with their class: per cents of the class's samples or pixels."""
    rows = []
    for name, counts in zip(examined.classes, examined.confusion.tolist(), strict=True):
        total = max(1, sum(counts))
        cells = []
        for predicted, value in zip(examined.classes, counts, strict=True):
            text = f"{100 * value / total:.0f}" if value / total >= 0.005 or not value else "<1"
            cells.append(Cell(text, f"{name} predicted as {predicted}: {value:,} of {total:,}", value / total))
        rows.append((name, cells))
    return rows


def confused_pairs(examined: Examination) -> list[Row]:
    """Returns the classes that are confused most, most first, then in the order of the classes."""
    wrong = examined.confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows: list[Row] = []
    for index in np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS].tolist():
        label, predicted = divmod(index, len(wrong))
        value = int(wrong[label, predicted])
        if value:
            share = value / int(examined.confusion[label].sum())
            names = [examined.classes[label], examined.classes[predicted]]
            rows.append([*names, number(value), number(share, percent=True)])
    return rows


def draw_map(values: Map) -> Image.Image:
    """Returns a heat map, scaled to its own range. Viridis reads alike to the colour-blind and in grey."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    share = np.nan_to_num((values - low) / (high - low)) if high > low else np.full(values.shape, 0.5)
    return Image.fromarray(matplotlib.colormaps["viridis"](share, bytes=True)[..., :3].copy())
