"""Draws the predictions of a network for samples from all over a data set.

every n-th sample ──network──▶ answers.py's row ──▶ a row of tiles ──▶ contact sheet (PNG)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from pipeline.answers import AnswerOptions, Seen, decode_mask
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
from pipeline.tasks.classify import ClassificationTask
from pipeline.tasks.detect import DetectionTask
from pipeline.tasks.segment import SegmentationTask
from pipeline.world import World

# Boxes and labels of objects need larger tiles.
_BOX_TILE_PX = 300

MIN_SCORE = 0.5
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
    # All tasks that can be drawn have answers.
    drawn_task: Any = task
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
            seen = Seen(batch.extents[0], (original.height, original.width))
            outputs: Any = task.outputs(task.model, batch)
            (answer,) = drawn_task.answers(outputs, [seen], shards.classes, AnswerOptions(1, MIN_SCORE))
            target = batch.targets[0]
            rows.append(drawing.make_tiles(original, key, answer, target, shards.classes))
    if not rows:
        raise InputError(f"{shards.url(0)}: has no sample that can be read and drawn")
    about = f"{len(rows)} of {len(shards)} samples"
    draw_sheet(rows, drawing, path, title, about, note=shards.attribution)


def draw_sheet(
    rows: list[list[Tile]],
    drawing: "_Drawing",
    path: Path,
    title: str,
    about: str,
    *,
    note: str | None = None,
) -> None:
    """Draws a row of tiles for each sample into the PNG `path`. Raises InputError where it cannot be written."""
    tiles = [tile for row in rows for tile in row]
    sheet = Sheet(
        title,
        about,
        # One or two samples of several tiles get a line of the sheet each.
        columns=drawing.columns if len(rows) > 2 or len(rows[0]) == 1 else len(rows[0]),
        count=len(tiles),
        num_details=1,
        tile_px=drawing.tile_px,
        note=note,
    )
    for picture, caption, detail in tiles:
        sheet.add(picture, caption, detail)
    sheet.save(path)


def answer_tile(answer: dict[str, Any], original: Image.Image, name: str, classes: list[str]) -> Tile:
    """Returns the tile of what a row of answers.py says about an image."""
    if "mask" in answer:
        return colourise(decode_mask(answer["mask"]), len(classes)), "prediction", ", ".join(answer["labels"])
    if "boxes" not in answer:
        return original, f"{answer['label']} {answer['score']:.0%}", name
    found = []
    columns = answer["labels"], answer["scores"], answer["boxes"]
    for number, (label, score, bbox) in enumerate(zip(*columns, strict=True)):
        each = {"label": classes.index(label), "score": score, "bbox": bbox}
        if "segmentations" in answer:
            each["segmentation"] = answer["segmentations"][number]
        if score >= MIN_SCORE:
            found.append(each)
    picture = draw_objects(original, found, classes, _BOX_TILE_PX)
    return picture, "prediction", f"{len(found)} with scores from {MIN_SCORE:.0%} on"


def _classification_tiles(
    original: Image.Image,
    key: str,
    answer: dict[str, Any],
    label: Tensor,
    classes: list[str],
) -> list[Tile]:
    picture, caption, detail = answer_tile(answer, original, key, classes)
    verdict = "right" if answer["label"] == classes[int(label)] else f"is {classes[int(label)]}"
    return [(picture, f"{caption}, {verdict}", detail)]


def _segmentation_tiles(
    original: Image.Image,
    key: str,
    answer: dict[str, Any],
    target: MaskTarget,
    classes: list[str],
) -> list[Tile]:
    truth = target.labels.cpu()
    predicted = torch.from_numpy(decode_mask(answer["mask"]))
    labelled = truth != IGNORED
    right = (truth == predicted)[labelled].double().mean().item()
    picture, caption, detail = answer_tile(answer, original, key, classes)
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
            picture,
            f"{caption}, {right:.1%} of pixels right",
            detail,
        ),
    ]


def _detection_tiles(
    original: Image.Image,
    key: str,
    answer: dict[str, Any],
    truth: Truth,
    classes: list[str],
) -> list[Tile]:
    objects = [annotation for annotation in truth.annotations if not annotation["iscrowd"]]
    # Small objects are drawn on top of large ones.
    objects.sort(key=lambda annotation: annotation["area"])
    return [
        (
            draw_objects(original, objects, classes, _BOX_TILE_PX),
            key,
            f"truth: {len(objects)} objects",
        ),
        answer_tile(answer, original, key, classes),
    ]


class _Drawing(NamedTuple):
    """How the predictions of a task are drawn."""

    make_tiles: Callable[[Image.Image, str, Any, Any, list[str]], list[Tile]]
    """Makes the tiles of a sample from its stored image and key, the answer, the target and the classes."""
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
