"""Draws the predictions of a network for samples from all over a data set.

every n-th sample ──network──▶ outputs ──▶ a row of tiles ──▶ contact sheet (PNG)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from pipeline.coco_results import as_results
from pipeline.config import ImageConfig, TaskConfig
from pipeline.errors import InputError
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import EvalFeed
from pipeline.feed.task_transforms import MaskTarget
from pipeline.pictures.boxes import draw_boxes
from pipeline.pictures.contact_sheet import Sheet
from pipeline.pictures.palette import colourise
from pipeline.protocols import Task
from pipeline.shards.images import IGNORED, decode
from pipeline.shards.index import ShardSet
from pipeline.shards.object_annotations import mask
from pipeline.tasks import segment
from pipeline.tasks.classify import ClassificationTask
from pipeline.tasks.detect import DetectionTask
from pipeline.tasks.segment import SegmentationTask
from pipeline.world import World
from pvt.detector import Detections

# Boxes and labels of objects need larger tiles.
_BOX_TILE_PX = 300

_MIN_SCORE = 0.5
"""Detections with a lower score are not drawn."""

Tile = tuple[Image.Image, str, str]
"""A picture, its caption and a smaller line below that."""


class TaskAndImage(Protocol):
    """The configuration of a run, or the card of a registered model."""

    @property
    def task(self) -> TaskConfig: ...

    @property
    def image(self) -> ImageConfig: ...


def draw_predictions(
    task: Task,
    shards: ShardSet,
    config: TaskAndImage,
    count: int,
    path: Path,
    title: str,
) -> None:
    """Draws `count` predictions of a trained network into the PNG `path`.

    A segmenter's samples have an image, the truth and the prediction, a detector's the truth and the prediction. Raises
    InputError where no sample can be read or the file cannot be written.
    """
    drawing = DRAWINGS.get(type(task))
    if drawing is None:
        raise InputError(f"predictions of task {config.task.name} cannot be drawn: do without --draw")
    rows: list[list[Tile]] = []
    device = next(task.model.parameters()).device
    # Rank 0 of n ranks evaluates every n-th sample.
    every_nth = World(size=max(1, len(shards) // count), device=device)
    feed = EvalFeed(
        shards,
        every_nth,
        config.image,
        task=config.task,
        batch_size=1,
    )
    with torch.inference_mode():
        for batch in feed:
            if len(rows) == count:
                break
            # A rejected sample has no weight.
            if not batch.weights[0]:
                continue
            shard = int(batch.samples.shard[0])
            row = int(batch.samples.row[0])
            original = decode(shards.read(shard, row))
            key = shards.key(shard, row)
            output: Any = task.outputs(task.model, batch)[0]
            target = batch.targets[0]
            rows.append(drawing.make_tiles(original, key, output, target, shards.classes))
    if not rows:
        raise InputError(f"{shards.url(0)}: has no sample that can be read and drawn")
    tiles = [tile for row in rows for tile in row]
    sheet = Sheet(
        title,
        f"{len(rows)} of {len(shards)} samples",
        # One or two samples of several tiles get a line of the sheet each.
        columns=drawing.columns if len(rows) > 2 or len(rows[0]) == 1 else len(rows[0]),
        count=len(tiles),
        num_details=1,
        tile_px=drawing.tile_px,
        note=shards.attribution,
    )
    for picture, caption, detail in tiles:
        sheet.add(picture, caption, detail)
    sheet.save(path)


def _classification_tiles(
    original: Image.Image,
    key: str,
    logits: Tensor,
    label: Tensor,
    classes: list[str],
) -> list[Tile]:
    probability, best = logits.float().softmax(dim=0).max(dim=0)
    verdict = "right" if best == label else f"is {classes[int(label)]}"
    return [(original, f"{classes[int(best)]} {probability:.0%}, {verdict}", key)]


def _segmentation_tiles(
    original: Image.Image,
    key: str,
    logits: Tensor,
    target: MaskTarget,
    classes: list[str],
) -> list[Tile]:
    truth = target.labels.cpu()
    predicted = segment.predict(logits.float(), target).byte().cpu()
    labelled = truth != IGNORED
    right = (truth == predicted)[labelled].double().mean().item()
    return [
        (
            original,
            key,
            f"{original.width} × {original.height}",
        ),
        (
            colourise(truth.numpy(), len(classes)),
            "truth",
            _list_classes(truth, classes),
        ),
        (
            colourise(predicted.numpy(), len(classes)),
            f"prediction, {right:.1%} of pixels right",
            _list_classes(predicted, classes),
        ),
    ]


def _detection_tiles(
    original: Image.Image,
    key: str,
    detections: Detections,
    truth: Truth,
    classes: list[str],
) -> list[Tile]:
    results = as_results(detections, truth.size, truth.extent)
    good = [result for result in results if result["score"] >= _MIN_SCORE]
    objects = [annotation for annotation in truth.annotations if not annotation["iscrowd"]]
    # Small objects are drawn on top of large ones.
    objects.sort(key=lambda annotation: annotation["area"])
    return [
        (
            draw_objects(original, objects, classes, _BOX_TILE_PX),
            key,
            f"truth: {len(objects)} objects",
        ),
        (
            draw_objects(original, good, classes, _BOX_TILE_PX),
            "prediction",
            f"{len(good)} with scores from {_MIN_SCORE:.0%} on",
        ),
    ]


class _Drawing(NamedTuple):
    """How the predictions of a task are drawn."""

    make_tiles: Callable[[Image.Image, str, Any, Any, list[str]], list[Tile]]
    """Makes the tiles of a sample from its stored image and key, the network's output, the target and the classes."""
    columns: int = 6
    tile_px: int = 200


DRAWINGS: dict[type[Task], _Drawing] = {
    ClassificationTask: _Drawing(_classification_tiles),
    SegmentationTask: _Drawing(_segmentation_tiles),
    DetectionTask: _Drawing(_detection_tiles, columns=4, tile_px=_BOX_TILE_PX),
}
"""How predictions are drawn, by the class of the task."""


def draw_objects(
    original: Image.Image,
    found: list[dict[str, Any]],
    classes: list[str],
    side_px: int,
) -> Image.Image:
    """Returns an image, its long side `side_px`, with objects or detections in COCO's form; the first is on top."""
    scores = masks = None
    if all("score" in each for each in found):
        scores = [each["score"] for each in found]
    if all("segmentation" in each for each in found):
        # One at a time, because masks at the image's own size are large.
        masks = (mask(each, original.height, original.width) for each in found)
    return draw_boxes(
        original,
        [each["bbox"] for each in found],
        [each["label"] for each in found],
        scores,
        masks,
        classes,
        side_px=side_px,
    )


def _list_classes(labels: Tensor, classes: list[str]) -> str:
    """Returns the names of the classes on a label map, those with the most pixels first."""
    labelled = labels[labels != IGNORED].long()
    counts = torch.bincount(labelled, minlength=len(classes))
    order = counts.argsort(descending=True).tolist()
    return ", ".join(classes[label] for label in order if counts[label])
