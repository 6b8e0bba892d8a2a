"""Pictures of what a network says of samples from all over a data set."""

from pathlib import Path
from typing import Any, Protocol

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
from pipeline.shards.images import IGNORED, decode
from pipeline.shards.index import ShardSet
from pipeline.shards.object_annotations import mask
from pipeline.tasks import segment
from pipeline.tasks.build import AnyTask
from pipeline.tasks.detect import DetectionTask
from pipeline.tasks.segment import SegmentationTask
from pipeline.world import World
from pvt.detector import Detections

_COLUMNS, _TILE_PX = 6, 200
_BOX_COLUMNS, _BOX_TILE_PX = 4, 300  # there is more to be seen on them
_SHOWN_SCORE = 0.5

Tile = tuple[Image.Image, str, str]  # with a caption and a smaller line


class TaskAndImage(Protocol):
    """A run's, or a registered model's card."""

    @property
    def task(self) -> TaskConfig: ...

    @property
    def image(self) -> ImageConfig: ...


def draw_predictions(task: AnyTask, shards: ShardSet, config: TaskAndImage, count: int, path: Path, title: str) -> None:
    """Draw `count` predictions of a trained network into the PNG `path`: in segmentation image, truth and prediction of
    each, in detection truth and prediction. Raises InputError where no sample is whole or the file cannot be written.
    """
    rows: list[list[Tile]] = []
    device = next(task.model.parameters()).device
    # Every so many-th sample, as the first of so many ranks would take them.
    stride = World(size=max(1, len(shards) // count), device=device)
    with torch.inference_mode():
        for batch in EvalFeed(shards, stride, config.image, task=config.task, batch_size=1):
            if len(rows) == count:
                break
            if batch.weights[0]:
                shard, row = int(batch.samples.shard[0]), int(batch.samples.row[0])
                original, key = decode(shards.read(shard, row)), shards.key(shard, row)
                output: Any = task.outputs(task.model, batch)[0]
                if isinstance(task, DetectionTask):
                    rows.append(_objects(original, key, output, batch.targets[0], shards.classes))
                elif isinstance(task, SegmentationTask):
                    rows.append(_maps(original, key, output.float(), batch.targets[0], shards.classes))
                else:
                    rows.append(_label(original, key, output.float(), int(batch.targets[0]), shards.classes))
    if not rows:
        raise InputError(f"{shards.url(0)}: has no sample that is whole, to be drawn")
    most, tile_px = (_BOX_COLUMNS, _BOX_TILE_PX) if isinstance(task, DetectionTask) else (_COLUMNS, _TILE_PX)
    columns = most if len(rows) > 2 or len(rows[0]) == 1 else len(rows[0])
    tiles = [tile for row in rows for tile in row]
    about = f"{len(rows)} of {len(shards)} samples"
    sheet = Sheet(
        title, about, columns=columns, count=len(tiles), num_details=1, tile_px=tile_px, note=shards.attribution
    )
    for picture, caption, detail in tiles:
        sheet.add(picture, caption, detail)
    sheet.save(path)


def _label(original: Image.Image, key: str, logits: Tensor, label: int, classes: list[str]) -> list[Tile]:
    probability, best = logits.softmax(dim=0).max(dim=0)
    verdict = "right" if best == label else f"is {classes[label]}"
    return [(original, f"{classes[int(best)]} {probability:.0%}, {verdict}", key)]


def _maps(original: Image.Image, key: str, logits: Tensor, target: MaskTarget, classes: list[str]) -> list[Tile]:
    truth, predicted = target.labels.cpu(), segment.predict(logits, target).byte().cpu()
    labelled = truth != IGNORED
    right = (truth == predicted)[labelled].double().mean().item()
    number = len(classes)
    return [
        (original, key, f"{original.width} × {original.height}"),
        (colourise(truth.numpy(), number), "truth", _named(truth, classes)),
        (colourise(predicted.numpy(), number), f"prediction, {right:.1%} of pixels right", _named(predicted, classes)),
    ]


def _objects(original: Image.Image, key: str, detections: Detections, truth: Truth, classes: list[str]) -> list[Tile]:
    found = [each for each in as_results(detections, truth.size, truth.extent) if each["score"] >= _SHOWN_SCORE]
    single = sorted((each for each in truth.annotations if not each["iscrowd"]), key=lambda each: each["area"])
    about = f"{len(found)} of scores from {_SHOWN_SCORE:.0%} on"
    return [
        (drawn(original, single, classes, _BOX_TILE_PX), key, f"truth: {len(single)} objects"),
        (drawn(original, found, classes, _BOX_TILE_PX), "prediction", about),
    ]


def drawn(original: Image.Image, found: list[dict[str, Any]], classes: list[str], side_px: int) -> Image.Image:
    """An image, its long side `side_px`, with objects of it or results of detection, in COCO's form; first ones on
    top."""
    boxes, labels = [each["bbox"] for each in found], [each["label"] for each in found]
    scores = [each["score"] for each in found] if all("score" in each for each in found) else None
    masks = None
    if all("segmentation" in each for each in found):
        masks = (mask(each, original.height, original.width) for each in found)
    return draw_boxes(original, boxes, labels, scores, masks, classes, side_px=side_px)


def _named(labels: Tensor, classes: list[str]) -> str:
    """The classes of a map, most pixels first."""
    counts = torch.bincount(labels[labels != IGNORED].long(), minlength=len(classes))
    return ", ".join(classes[i] for i in counts.argsort(descending=True).tolist() if counts[i])
