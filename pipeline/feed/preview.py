"""Draws what augmentation makes of a run's first samples, with its parameters.

each of some samples:       the original │ its views in epochs 0, 1, 2, …
where images are mixed:     two partners before mixing │ each of them mixed with the other, as they are fed
for images with label maps: the first crops │ their targets
for images with objects:    the original │ its views, with their targets drawn into them
"""

import contextlib
import copy
import functools
import itertools
import logging
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
from pipeline.evaluation_view import to_picture
from pipeline.feed import image_ops, mixup
from pipeline.feed.augment import Views
from pipeline.feed.box_transforms import BoxTransform
from pipeline.feed.dali import Decoder
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.feed.random_ops import Op
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

log = logging.getLogger(__name__)

SAMPLES, VIEWS, PAIRS, MAPS = 6, 6, 3, 12
OBJECTS_TILE_PX = 240
_CPU = torch.device("cpu")
_WITHOUT_ARGUMENT = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT)

Tile = tuple[Any, ...]
"""The arguments of Sheet.add: a picture, its caption and smaller lines."""


class _FedSample(NamedTuple):
    """A sample as it was fed, and where it came from."""

    batch: MicroBatch
    # Its index in the batch.
    number: int
    shard: int
    row: int
    label: int

    @property
    def image(self) -> Tensor:
        return self.batch.images[self.number]

    @property
    def target(self) -> Any:
        return self.batch.targets[self.number]

    @property
    def position(self) -> int:
        """The sample's position in the global batch."""
        return int(self.batch.samples.position[self.number])


class _Grid(NamedTuple):
    """Rows of tiles and their layout. A row is drawn when its function is called."""

    about: str
    rows: Sequence[Callable[[], list[Tile]]]
    columns: int = VIEWS + 1
    num_details: int = 5
    tile_px: int = 150


def preview(config: Config, shards: ShardSet, path: Path) -> dict[str, Any]:
    """Draws a grid of augmented samples of the run's training data `shards` into the PNG file `path`.

    Progress goes to standard error. Raises InputError where the data does not fit the run, or for a file that cannot be
    written.
    """
    if shards.annotations == "unlabelled" and not config.task.annotations:
        # A classifier's views do not depend on the label, so they may all be of one class.
        shards = copy.copy(shards)
        shards.classes, shards.annotations = ["unlabelled"], None
    name = config.run.name
    batch_size = config.train.global_batch_size
    log.info(f"{name}: reading the first batch, {batch_size:,} samples")
    fed: list[_FedSample] = []
    with contextlib.closing(TrainFeed(config, shards, World())) as feed:
        for batch in feed.next():
            fed += _list_samples(shards, batch)
    num_views = VIEWS
    if shards.annotations == "semantic":
        num_views = 1
        chosen = fed[:MAPS]
        grid = _plan_maps(config, shards, chosen)
    else:
        chosen = _choose_of_many_classes(fed)
        plan = _plan_objects if shards.annotations == "objects" else _plan_labelled
        grid = plan(config, shards, chosen)
    if config.mix.is_active and not shards.annotations:
        grid = _add_mixed(config, shards, grid, fed)
    sheet = Sheet(
        name,
        f"seed {config.run.seed}; {grid.about}",
        columns=grid.columns,
        count=grid.columns * len(grid.rows),
        num_details=grid.num_details,
        tile_px=grid.tile_px,
        note=shards.attribution,
    )
    progress = tqdm(
        grid.rows,
        "drawing",
        unit="row",
        file=sys.stderr,
        disable=None,
        dynamic_ncols=True,
    )
    for draw_row in progress:
        for tile in draw_row():
            sheet.add(*tile)
        sheet.end_row()
    sheet.save(path)
    return {"sheet": str(path), "samples": len(chosen), "views": num_views}


def _list_samples(shards: ShardSet, batch: MicroBatch) -> list[_FedSample]:
    """Returns the samples of a batch, fillers excepted."""
    samples = batch.samples
    labels = shards.records(samples.shard, samples.row)["label"]
    fed = []
    for index in np.flatnonzero(batch.weights.numpy()).tolist():
        sample = _FedSample(
            batch,
            index,
            int(samples.shard[index]),
            int(samples.row[index]),
            int(labels[index]),
        )
        fed.append(sample)
    return fed


def _choose_of_many_classes(fed: list[_FedSample]) -> list[_FedSample]:
    """Returns at most SAMPLES different ones in their order, first one of each class."""
    # With repeated augmentation a batch holds copies of a sample; the last one is taken.
    different = {(sample.shard, sample.row): sample for sample in fed}.values()
    first_of_class = {sample.label: sample for sample in reversed(different)}

    def is_further(sample: _FedSample) -> bool:
        return sample is not first_of_class[sample.label]

    return sorted(different, key=is_further)[:SAMPLES]


def _make_transform(config: Config, shards: ShardSet) -> TaskTransform:
    return task_transform(
        config.task,
        config.image,
        len(shards.classes),
        config.augment,
    )


def _plan_labelled(
    config: Config,
    shards: ShardSet,
    chosen: list[_FedSample],
) -> _Grid:
    """Returns a row for each sample: the original, then its views."""
    draw_views = functools.partial(_draw_views, config, shards, _make_transform(config, shards))

    def draw_row(sample: _FedSample) -> list[Tile]:
        original, key, size = _read_original(shards, sample)
        tiles: list[Tile] = [(original, key, f"class {shards.classes[sample.label]}", size)]
        views, images = draw_views(sample, range(VIEWS), config.image.size)
        for epoch, image in enumerate(images):
            details = _describe_view(views[epoch : epoch + 1])
            tiles.append((to_picture(image, config.image), f"epoch {epoch}", *details))
        return tiles

    about = f"each row an image, then its views in epochs 0 to {VIEWS - 1}"
    rows = [functools.partial(draw_row, sample) for sample in chosen]
    return _Grid(about, rows)


def _add_mixed(
    config: Config,
    shards: ShardSet,
    grid: _Grid,
    fed: list[_FedSample],
) -> _Grid:
    """Returns the grid with rows of two partners, before mixing and mixed."""
    draw_views = functools.partial(_draw_views, config, shards, _make_transform(config, shards))
    share = config.train.global_batch_size // config.data.lanes

    def draw_row(first: _FedSample, second: _FedSample) -> list[Tile]:
        tiles: list[Tile] = []
        size = first.image.shape[-1]
        for sample in (first, second):
            epoch = int(sample.batch.samples.epoch[sample.number])
            _, (image,) = draw_views(sample, [epoch], size)
            key = shards.key(sample.shard, sample.row)
            class_ = f"class {shards.classes[sample.label]}"
            tiles.append((to_picture(image, config.image), key, class_, "before mixing"))
        lane = first.position // share
        key = keys.key(config.run.seed, Stream.MIX, 0, np.array([lane]))
        blend = mixup.draw(config.mix, key, size, size)
        for sample, partner in ((first, second), (second, first)):
            details = _describe_mix(shards, blend, sample, partner)
            tiles.append((to_picture(sample.image, config.image), *details))
        return tiles

    pairs = []
    for first, second in itertools.pairwise(fed):
        if first.number % 2 == 0 and second.number == first.number + 1:
            pairs.append((first, second))

    def rank_pair(pair: tuple[_FedSample, _FedSample]) -> tuple[bool, int]:
        # Partners of two classes come first, and then pairs of different lanes, because a lane has one draw.
        first, second = pair
        return first.label == second.label, first.position % share

    pairs.sort(key=rank_pair)
    about = f"{grid.about}; below two partners of the first batch, then each mixed with the other, as it is fed"
    rows = [functools.partial(draw_row, *pair) for pair in pairs[:PAIRS]]
    return grid._replace(about=about, rows=[*grid.rows, *rows])


def _describe_mix(
    shards: ShardSet,
    blend: mixup.Blends,
    sample: _FedSample,
    partner: _FedSample,
) -> list[str]:
    weight = float(blend.label_weight[0])
    kind = "not mixed"
    if blend.box.any():
        kind = "cutmix"
    elif weight < 1:
        kind = "mixup"
    lines = [kind]
    for part, source in ((weight, sample), (1 - weight, partner)):
        lines.append(f"{part:.2f} of {shards.key(source.shard, source.row)}")
    total = 0.0
    # Two partners of one class have one label.
    for label in dict.fromkeys((sample.label, partner.label)):
        probability = float(sample.target[label])
        lines.append(f"label {shards.classes[label]}: {probability:.2f}")
        total += probability
    rest = 1 - total
    if rest > 0.005:
        lines.append(f"other labels: {rest:.2f}")
    return lines


def _plan_maps(
    config: Config,
    shards: ShardSet,
    chosen: list[_FedSample],
) -> _Grid:
    """Returns rows of three crops, each with its target beside it."""

    def draw_row(samples: list[_FedSample]) -> list[Tile]:
        tiles: list[Tile] = []
        for sample in samples:
            key = shards.key(sample.shard, sample.row)
            target = sample.target.byte().numpy()
            tiles.append((to_picture(sample.image, config.image), key))
            tiles.append((colourise(target, len(shards.classes)), "target"))
        return tiles

    about = "crops of the first batch and, beside each, the classes of its pixels"
    rows = []
    for first in range(0, len(chosen), 3):
        rows.append(functools.partial(draw_row, chosen[first : first + 3]))
    return _Grid(about, rows, columns=6, num_details=0)


def _plan_objects(
    config: Config,
    shards: ShardSet,
    chosen: list[_FedSample],
) -> _Grid:
    """Returns a row for each sample: the original with its annotations, then its views with their targets."""
    transform = _make_transform(config, shards)
    assert isinstance(transform, BoxTransform)
    draw_views = functools.partial(_draw_views, config, shards, transform)

    def draw_row(sample: _FedSample) -> list[Tile]:
        original, key, size = _read_original(shards, sample)
        stored = shards.read_annotation(sample.shard, sample.row)
        annotated = object_annotations.decode(stored, len(shards.classes))
        drawn = draw_annotated(
            original,
            annotated,
            shards.classes,
            OBJECTS_TILE_PX,
        )
        count = f"{len(annotated.annotations)} annotations"
        tiles: list[Tile] = [(drawn, key, count, size)]
        views, images = draw_views(sample, range(VIEWS), config.image.size)
        for epoch, image in enumerate(images):
            view, target = transform.training_target(stored, views[epoch : epoch + 1])
            height, width = view.extent[0].tolist()
            picture = to_picture(image[:, :height, :width], config.image)
            drawn = _draw_objects(picture, target, shards.classes)
            count = f"{len(target)} objects on {width} × {height}"
            tiles.append((drawn, f"epoch {epoch}", count, *_describe_view(view)))
        return tiles

    about = f"each row an image with its crowds, then its views in epochs 0 to {VIEWS - 1}"
    rows = [functools.partial(draw_row, sample) for sample in chosen]
    return _Grid(about, rows, tile_px=OBJECTS_TILE_PX)


def _draw_objects(
    picture: Image.Image,
    target: Objects,
    classes: list[str],
) -> Image.Image:
    corners = target.boxes.numpy()
    start = corners[:, :2]
    # From corners to the upper left corner and the size.
    boxes = np.concatenate([start, corners[:, 2:] - start], axis=1)
    return draw_boxes(
        picture,
        boxes.tolist(),
        target.labels.tolist(),
        None,
        None if target.masks is None else target.masks.numpy(),
        classes,
        side_px=OBJECTS_TILE_PX,
    )


def _draw_views(
    config: Config,
    shards: ShardSet,
    transform: TaskTransform,
    sample: _FedSample,
    epochs: Sequence[int],
    size: int,
) -> tuple[Views, Tensor]:
    """Returns a sample's views in n epochs, and their images before mixing, [n, 3, H, W]."""
    seed = config.run.seed
    num_views = len(epochs)
    record = shards.index(sample.shard)[sample.row]
    samples = sample.batch.samples
    hw = np.full((num_views, 2), (record["height"], record["width"]))
    key = keys.key(
        seed,
        Stream.AUGMENT,
        np.array(epochs),
        samples.id[sample.number],
        samples.copy[sample.number],
    )
    views = transform.training_views(size, key, hw)
    encoded = np.frombuffer(shards.read(sample.shard, sample.row), np.uint8)
    decoder = Decoder.on_cpu(
        lambda _: ([encoded] * num_views, views),
        batch_size=num_views,
    )
    noise = image_ops.noise(seed, _CPU) if config.augment.erase_mode == "pixel" else None
    finisher = image_ops.Finisher(config.image, _CPU, noise)
    images = torch.empty(num_views, 3, *views.canvas)
    for i, window in enumerate(decoder.next()):
        one = slice(i, i + 1)
        finisher.finish_window(window, views[one], images[one])
    decoder.close()
    return views, images


def _read_original(shards: ShardSet, sample: _FedSample) -> tuple[Image.Image, str, str]:
    """Returns the stored image of a sample, its key, and its size in words."""
    where = sample.shard, sample.row
    original = decode(shards.read(*where))
    return original, shards.key(*where), f"{original.width} × {original.height}"


def _describe_view(view: Views) -> list[str]:
    top, left = view.anchor[0]
    height, width = view.shape[0]
    window = f"{width} × {height} at {left}, {top}"
    lines = [f"{window}, flipped" if view.flip[0] else window]
    for op, argument in zip(view.ops[:, 0], view.args[:, 0], strict=True):
        if op == Op.IDENTITY:
            continue
        name = Op(op).name.lower()
        lines.append(name if op in _WITHOUT_ARGUMENT else f"{name} {argument:.3g}")
    top, bottom, left, right = view.erase[0]
    if bottom > top:
        lines.append(f"erased {right - left} × {bottom - top}")
    return lines
