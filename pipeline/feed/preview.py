"""What augmentation makes of a run's first samples, drawn with its parameters.

each of some samples:      the original │ its views in epochs 0, 1, 2, …
where images are mixed:    two partners before mixing │ each of them mixed with the other, as they are fed
of images with label maps: the first crops │ their targets
of images with objects:    as of others, with what is to be found drawn
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline import keys
from pipeline.config import Config
from pipeline.feed import image_ops, mixup
from pipeline.feed.augment import Op, Views
from pipeline.feed.box_transforms import BoxTransform
from pipeline.feed.dali import Decoder
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.feed.task_transforms import TaskTransform, task_transform
from pipeline.keys import Stream
from pipeline.pictures.boxes import draw_boxes
from pipeline.pictures.contact_sheet import Sheet
from pipeline.pictures.palette import colourise
from pipeline.shards import object_annotations
from pipeline.shards.images import decode
from pipeline.shards.index import ShardSet
from pipeline.shards.show_dataset import draw_annotated
from pipeline.world import World
from pvt.detector import Objects

SAMPLES, VIEWS, PAIRS, MAPS = 6, 6, 3, 12
OBJECTS_TILE_PX = 240
_CPU = torch.device("cpu")
_WITHOUT_ARGUMENT = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT)

Tile = tuple[Any, ...]
"""What Sheet.add takes: a picture, its caption and smaller lines."""


class _Fed(NamedTuple):
    """A sample as it was fed, and where it came from."""

    batch: MicroBatch
    place: int
    shard: int
    row: int
    label: int


class _Grid(NamedTuple):
    """What is drawn: rows of tiles, each made when it is its turn."""

    about: str
    rows: Sequence[Callable[[], list[Tile]]]
    columns: int = VIEWS + 1
    num_details: int = 5
    tile_px: int = 150


def preview(config: Config, shards: ShardSet, path: Path) -> dict[str, Any]:
    """Draw a grid of augmented samples of the run's training data `shards` into the PNG file `path`.

    Progress goes to standard error. Raises InputError where the data does not fit the run, or for a file that cannot be
    written.
    """
    name, batch_size = config.run.name, config.train.global_batch_size
    print(f"{name}: reading the first batch, {batch_size:,} samples", file=sys.stderr, flush=True)
    with contextlib.closing(TrainFeed(config, shards, World())) as feed:
        fed = [each for batch in feed.next() for each in _fed(shards, batch)]
    draw = {None: _labelled, "semantic": _maps, "objects": _objects}[shards.annotations]
    chosen = fed[:MAPS] if shards.annotations == "semantic" else _of_many_classes(fed)
    grid = draw(config, shards, chosen)
    if config.mix.active and not shards.annotations:
        grid = _with_mixed(config, shards, grid, fed)
    sheet = Sheet(
        name,
        f"seed {config.run.seed}; {grid.about}",
        columns=grid.columns,
        count=grid.columns * len(grid.rows),
        num_details=grid.num_details,
        tile_px=grid.tile_px,
        note=shards.attribution,
    )
    for row in tqdm(grid.rows, "drawing", unit="row", file=sys.stderr, disable=None, dynamic_ncols=True):
        for tile in row():
            sheet.add(*tile)
        sheet.end_row()
    sheet.save(path)
    return {"sheet": str(path), "samples": len(chosen), "views": 1 if draw is _maps else VIEWS}


def _fed(shards: ShardSet, batch: MicroBatch) -> list[_Fed]:
    """Returns the samples of a batch that are not just fillers."""
    samples = batch.samples
    labels = shards.records(samples.shard, samples.row)["label"]
    columns = (column.tolist() for column in (samples.shard, samples.row, labels))
    fed = [_Fed(batch, place, *row) for place, row in enumerate(zip(*columns, strict=True))]
    return [each for each in fed if batch.weights[each.place]]


def _of_many_classes(fed: list[_Fed]) -> list[_Fed]:
    """Returns at most SAMPLES different ones in their order, first one of each class."""
    different = {(each.shard, each.row): each for each in fed}.values()  # else with repeated augmentation some repeat
    first = {each.label: each for each in reversed(different)}
    return sorted(different, key=lambda each: each is not first[each.label])[:SAMPLES]


def _labelled(config: Config, shards: ShardSet, chosen: list[_Fed]) -> _Grid:
    recipe = task_transform(config.task, config.image, len(shards.classes), config.augment)

    def row(fed: _Fed) -> list[Tile]:
        original, key = decode(shards.read(fed.shard, fed.row)), shards.key(fed.shard, fed.row)
        class_, size = f"class {shards.classes[fed.label]}", f"{original.width} × {original.height}"
        views, images = _views(config, shards, recipe, fed, range(VIEWS), config.image.size)
        tiles: list[Tile] = [(original, key, class_, size)]
        for epoch, image in enumerate(images):
            tiles.append((_picture(config, image), f"epoch {epoch}", *_describe(views[epoch : epoch + 1])))
        return tiles

    about = f"each row an image, then its views in epochs 0 to {VIEWS - 1}"
    return _Grid(about, [functools.partial(row, fed) for fed in chosen])


def _with_mixed(config: Config, shards: ShardSet, grid: _Grid, fed: list[_Fed]) -> _Grid:
    """The grid with rows of two partners, before mixing and mixed: first those of two classes, and of different lanes,
    because a lane has one draw."""
    recipe = task_transform(config.task, config.image, len(shards.classes), config.augment)
    share = config.train.global_batch_size // config.data.lanes

    def position(fed: _Fed) -> int:
        return int(fed.batch.samples.position[fed.place])

    def row(pair: tuple[_Fed, _Fed]) -> list[Tile]:
        tiles, size = [], pair[0].batch.images.shape[-1]
        for one in pair:
            epoch = int(one.batch.samples.epoch[one.place])
            _, (image,) = _views(config, shards, recipe, one, [epoch], size)
            class_ = f"class {shards.classes[one.label]}"
            tiles.append((_picture(config, image), shards.key(one.shard, one.row), class_, "before mixing"))
        key = keys.key(config.run.seed, Stream.MIX, 0, np.array([position(pair[0]) // share]))
        blend = mixup.draw(config.mix, key, size, size)
        for one, other in (pair, pair[::-1]):
            picture = _picture(config, one.batch.images[one.place])
            tiles.append((picture, *_describe_mix(shards, blend, one, other)))
        return tiles

    neighbours = itertools.pairwise(fed)
    partners = (pair for pair in neighbours if pair[0].place % 2 == 0 and pair[1].place == pair[0].place + 1)
    pairs = sorted(partners, key=lambda pair: (pair[0].label == pair[1].label, position(pair[0]) % share))
    about = f"{grid.about}; below two partners of the first batch, then each mixed with the other, as it is fed"
    return grid._replace(about=about, rows=[*grid.rows, *(functools.partial(row, pair) for pair in pairs[:PAIRS])])


def _describe_mix(shards: ShardSet, blend: mixup.Blends, one: _Fed, other: _Fed) -> list[str]:
    weight, target = float(blend.label_weight[0]), one.batch.targets[one.place]
    kind = "cutmix" if blend.box.any() else "mixup" if weight < 1 else "not mixed"
    labels = dict.fromkeys((one.label, other.label))
    parts = (weight, one), (1 - weight, other)
    lines = [kind, *(f"{part:.2f} of {shards.key(fed.shard, fed.row)}" for part, fed in parts)]
    lines += [f"label {shards.classes[label]}: {target[label]:.2f}" for label in labels]
    rest = 1 - sum(float(target[label]) for label in labels)
    return [*lines, f"other labels: {rest:.2f}"] if rest > 0.005 else lines


def _maps(config: Config, shards: ShardSet, chosen: list[_Fed]) -> _Grid:
    def row(some: list[_Fed]) -> list[Tile]:
        tiles: list[Tile] = []
        for fed in some:
            target = colourise(fed.batch.targets[fed.place].byte().numpy(), len(shards.classes))
            tiles += [
                (_picture(config, fed.batch.images[fed.place]), shards.key(fed.shard, fed.row)),
                (target, "target"),
            ]
        return tiles

    about = "crops of the first batch and, beside each, the classes of its pixels"
    rows = [functools.partial(row, chosen[first : first + 3]) for first in range(0, len(chosen), 3)]
    return _Grid(about, rows, columns=6, num_details=0)


def _objects(config: Config, shards: ShardSet, chosen: list[_Fed]) -> _Grid:
    recipe = task_transform(config.task, config.image, len(shards.classes), config.augment)
    assert isinstance(recipe, BoxTransform)

    def row(fed: _Fed) -> list[Tile]:
        original, key = decode(shards.read(fed.shard, fed.row)), shards.key(fed.shard, fed.row)
        stored = shards.read_annotation(fed.shard, fed.row)
        annotated = object_annotations.decode(stored, len(shards.classes))
        drawn = draw_annotated(original, annotated, shards.classes, OBJECTS_TILE_PX)
        counts = f"{len(annotated.annotations)} annotations"
        tiles: list[Tile] = [(drawn, key, counts, f"{original.width} × {original.height}")]
        views, images = _views(config, shards, recipe, fed, range(VIEWS), config.image.size)
        for epoch, image in enumerate(images):
            view, target = recipe.training_target(stored, views[epoch : epoch + 1])
            height, width = view.extent[0].tolist()
            drawn = _with_objects(_picture(config, image[:, :height, :width]), target, shards.classes)
            tiles.append((drawn, f"epoch {epoch}", f"{len(target)} objects on {width} × {height}", *_describe(view)))
        return tiles

    about = f"each row an image with its crowds, then its views in epochs 0 to {VIEWS - 1}"
    return _Grid(about, [functools.partial(row, fed) for fed in chosen], tile_px=OBJECTS_TILE_PX)


def _with_objects(picture: Image.Image, target: Objects, classes: list[str]) -> Image.Image:
    corners, labels = target.boxes.numpy(), target.labels.tolist()
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    masks = None if target.masks is None else target.masks.numpy()
    return draw_boxes(picture, boxes, labels, None, masks, classes, side_px=OBJECTS_TILE_PX)


def _views(
    config: Config, shards: ShardSet, recipe: TaskTransform, fed: _Fed, epochs: Sequence[int], size: int
) -> tuple[Views, Tensor]:
    """A sample's views in n epochs, and their images before mixing, [n, 3, H, W]."""
    record, samples = shards.index(fed.shard)[fed.row], fed.batch.samples
    hw = np.full((len(epochs), 2), (record["height"], record["width"]))
    id_, copy = samples.id[fed.place], samples.copy[fed.place]
    key = keys.key(config.run.seed, Stream.AUGMENT, np.array(epochs), id_, copy)
    views = recipe.training_views(size, key, hw)
    encoded = [np.frombuffer(shards.read(fed.shard, fed.row), np.uint8)] * len(epochs)
    decoder = Decoder(
        lambda _: (encoded, views),
        batch_size=len(epochs),
        interpolation=config.image.interpolation,
        device=_CPU,
        num_threads=1,
        prefetch=1,
        deterministic=True,
        resizes=False,
    )
    noise = image_ops.noise(config.run.seed, _CPU) if config.augment.erase_mode == "pixel" else None
    finisher, images = image_ops.Finisher(config.image, _CPU, noise), torch.empty(len(epochs), 3, *views.canvas)
    for place, window in enumerate(decoder.next()):
        finisher.finish_window(window, views[place : place + 1], images[place : place + 1])
    decoder.close()
    return views, images


def _picture(config: Config, image: Tensor) -> Image.Image:
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.image.mean, config.image.std))
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
