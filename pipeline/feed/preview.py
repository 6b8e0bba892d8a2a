"""What augmentation makes of a run's first samples, drawn with its parameters.

each of some samples:      the original │ its views in epochs 0, 1, 2, …
where images are mixed:    the first batch, as it is fed
of images with label maps: the first crops │ their targets
of images with objects:    as of others, with what is to be found drawn
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import keys
from pipeline.boxes import draw_boxes
from pipeline.config import Config
from pipeline.feed import pixels
from pipeline.feed.augment import Op, Views
from pipeline.feed.dali import Decoder
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.feed.order import Samples
from pipeline.feed.recipe import Boxes, Recipe, recipe_of
from pipeline.keys import Stream
from pipeline.palette import colourise
from pipeline.shards import objects
from pipeline.shards.images import decode
from pipeline.shards.index import ShardSet
from pipeline.shards.show import draw_annotated
from pipeline.sheet import Sheet
from pipeline.world import World
from pvt.detector import Objects

SAMPLES, VIEWS, MAPS = 6, 6, 12
OBJECTS_TILE_PX = 240
_CPU = torch.device("cpu")
_WITHOUT_ARGUMENT = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT)


def preview(settings: Config, shards: ShardSet, path: Path) -> dict[str, Any]:
    """Draw a grid of augmented samples of the run's training data `shards` into the PNG file `path`."""
    feed = TrainFeed(settings, shards, World())
    (batch, *_) = feed.next()
    note = shards.attribution
    if shards.annotations == "semantic":
        feed.close()
        return _preview_maps(settings, shards, batch, path, note)
    _, first = np.unique(batch.samples.id, return_index=True)  # with repeated augmentation some are there twice
    samples = batch.samples.take(np.sort(first)[:SAMPLES])
    mixed = batch.images[: VIEWS + 1] if settings.mix.active else batch.images[:0]
    feed.close()
    recipe = recipe_of(settings.task, settings.image, len(shards.classes), settings.augment)
    if isinstance(recipe, Boxes):
        return _preview_objects(settings, shards, recipe, samples, path, note)

    columns, rows = VIEWS + 1, len(samples.id)
    about = f"seed {settings.run.seed}; each row an image, then its views in epochs 0 to {VIEWS - 1}"
    about += "; last row: a batch as it is fed, mixed" if len(mixed) else ""
    count = columns * rows + len(mixed)
    sheet = Sheet(settings.run.name, about, columns=columns, count=count, num_details=4, note=note)
    for number in range(rows):
        shard, row = int(samples.shard[number]), int(samples.row[number])
        original = decode(shards.read(shard, row))
        label = shards.classes[shards.index(shard)[row]["label"]]
        sheet.add(original, shards.key(shard, row), f"class {label}", f"{original.width} × {original.height}")
        views, images = _views(settings, shards, recipe, samples, number)
        for epoch, image in enumerate(images):
            sheet.add(_picture(settings, image), f"epoch {epoch}", *_describe(views[epoch : epoch + 1]))
    for image in mixed:
        sheet.add(_picture(settings, image), "mixed")
    sheet.save(path)
    return {"sheet": str(path), "samples": rows, "views": VIEWS}


def _preview_maps(
    settings: Config, shards: ShardSet, batch: MicroBatch, path: Path, note: str | None
) -> dict[str, Any]:
    count = min(len(batch.images), MAPS)
    about = f"seed {settings.run.seed}; crops of the first batch and, beside each, the classes of its pixels"
    sheet = Sheet(settings.run.name, about, columns=6, count=2 * count, num_details=0, note=note)
    for number in range(count):
        key = shards.key(int(batch.samples.shard[number]), int(batch.samples.row[number]))
        sheet.add(_picture(settings, batch.images[number]), key)
        sheet.add(colourise(batch.targets[number].byte().numpy(), len(shards.classes)), "target")
    sheet.save(path)
    return {"sheet": str(path), "samples": count, "views": 1}


def _preview_objects(
    settings: Config, shards: ShardSet, recipe: Boxes, samples: Samples, path: Path, note: str | None
) -> dict[str, Any]:
    rows, columns = len(samples.id), VIEWS + 1
    about = f"seed {settings.run.seed}; each row an image with its crowds, then its views in epochs 0 to {VIEWS - 1}"
    sheet = Sheet(
        settings.run.name,
        about,
        columns=columns,
        count=columns * rows,
        num_details=5,
        tile_px=OBJECTS_TILE_PX,
        note=note,
    )
    for number in range(rows):
        shard, row = int(samples.shard[number]), int(samples.row[number])
        original, stored = decode(shards.read(shard, row)), shards.read_annotation(shard, row)
        annotated = objects.decode(stored, len(shards.classes))
        drawn = draw_annotated(original, annotated, shards.classes, OBJECTS_TILE_PX)
        counts = f"{len(annotated.annotations)} annotations"
        sheet.add(drawn, shards.key(shard, row), counts, f"{original.width} × {original.height}")
        views, images = _views(settings, shards, recipe, samples, number)
        for epoch, image in enumerate(images):
            view, target = recipe.training_target(stored, views[epoch : epoch + 1])
            height, width = view.extent[0].tolist()
            drawn = _with_objects(_picture(settings, image[:, :height, :width]), target, shards.classes)
            size = f"{len(target)} objects on {width} × {height}"
            sheet.add(drawn, f"epoch {epoch}", size, *_describe(view))
    sheet.save(path)
    return {"sheet": str(path), "samples": rows, "views": VIEWS}


def _with_objects(picture: Image.Image, target: Objects, classes: list[str]) -> Image.Image:
    corners, labels = target.boxes.numpy(), target.labels.tolist()
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    masks = None if target.masks is None else target.masks.numpy()
    return draw_boxes(picture, boxes, labels, None, masks, classes, side_px=OBJECTS_TILE_PX)


def _views(settings: Config, shards: ShardSet, recipe: Recipe, samples: Samples, number: int) -> tuple[Views, Tensor]:
    """One sample's views in the first epochs, and their images before mixing, [VIEWS, 3, H, W]."""
    shard, row = int(samples.shard[number]), int(samples.row[number])
    record = shards.index(shard)[row]
    hw = np.full((VIEWS, 2), (record["height"], record["width"]))
    key = keys.key(settings.run.seed, Stream.AUGMENT, np.arange(VIEWS), samples.id[number], samples.copy[number])
    views = recipe.training_views(settings.image.size, key, hw)
    encoded = [np.frombuffer(shards.read(shard, row), np.uint8)] * VIEWS
    decoder = Decoder(
        lambda _: (encoded, views),
        batch_size=VIEWS,
        interpolation=settings.image.interpolation,
        device=_CPU,
        num_threads=1,
        prefetch=1,
        deterministic=True,
        resizes=False,
    )
    noise = pixels.noise(settings.run.seed, _CPU) if settings.augment.erase_mode == "pixel" else None
    finisher, images = pixels.Finisher(settings.image, _CPU, noise), torch.empty(VIEWS, 3, *views.canvas)
    for place, window in enumerate(decoder.next()):
        finisher.finish_window(window, views[place : place + 1], images[place : place + 1])
    decoder.close()
    return views, images


def _picture(settings: Config, image: Tensor) -> Image.Image:
    mean, std = (torch.tensor(value)[:, None, None] for value in (settings.image.mean, settings.image.std))
    return Image.fromarray((255 * (image * std + mean)).clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _describe(view: Views) -> list[str]:
    (top, left), (height, width) = view.anchor[0], view.shape[0]
    lines = [f"{width} × {height} at {left}, {top}{', flipped' if view.flip[0] else ''}"]
    for op, argument in zip(view.ops[:, 0], view.args[:, 0], strict=True):
        if op != Op.IDENTITY:
            name = Op(op).name.lower()
            lines.append(name if op in _WITHOUT_ARGUMENT else f"{name} {argument:.3g}")
    top, bottom, left, right = view.erase[0]
    return [*lines, f"erased {right - left} × {bottom - top}"] if bottom > top else lines
