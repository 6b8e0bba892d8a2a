"""Images with objects, cut, scaled and turned together with boxes and masks, and fed the same on every world."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO
from scipy.stats import ks_2samp
from torch import Tensor

from pipeline import keys
from pipeline.config import (
    AugmentConfig,
    Config,
    DetectionConfig,
    DetrConfig,
    ImageConfig,
    RetinaNetConfig,
    SourceConfig,
    load_config,
)
from pipeline.errors import InputError
from pipeline.feed import augment
from pipeline.feed.box_transforms import BoxTransform, Truth
from pipeline.feed.loader import EvalFeed, MicroBatch, TrainFeed
from pipeline.feed.preview import preview
from pipeline.feed.quarantine import Quarantine
from pipeline.keys import Stream
from pipeline.pictures.palette import palette
from pipeline.scenes import write_dataset as scene_layouts
from pipeline.shards import coco
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.shards.object_annotations import Annotated, encode
from pipeline.shards.open_data import open_training
from pipeline.shards.pack import pack
from pipeline.world import World
from pvt.detector import Objects
from tests.conftest import write_config

# Of pycocotools 2.0.11, which is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

COUNT, SIDE = 36, 64
CLASSES = 20
COLOURS = palette(CLASSES)
GROUND = 200  # no object's colour, nor that of padding, which is 128
CROP: dict[str, Any] = {
    "crop_prob": 0.5,
    "crop_short_sides": [50, 80],
    "crop_sides": [24, 60],
    "train_short_sides": [40, 64, 80],
}


def shape(rng: np.random.Generator, size: int) -> np.ndarray:
    """A mask that touches all four sides of its square."""
    mask = np.ones((size, size), bool)
    if rng.random() < 0.7:
        mask[: size // 2, : size // 2] = False  # an L, part of whose box it does not fill
    return mask


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO data set in which a pixel's colour tells its object: so an image says what its masks have to be.

    No two objects of an image are of one class. Masks are polygons or run lengths; one object in ten is a crowd, one
    has a box without area, and one image in six has no objects.
    """
    root, rng, annotations = tmp_path_factory.mktemp("painted"), np.random.default_rng(0), []
    (root / "train").mkdir()
    sizes = rng.integers(40, 150, (COUNT, 2)).tolist()
    for number, (height, width) in enumerate(sizes, 1):
        pixels = np.full((height, width, 3), GROUND, np.uint8)
        places = [(y, x) for y in range(0, height - 12, 12) for x in range(0, width - 12, 12)]
        chosen = (
            rng.choice(len(places), min(len(places), int(rng.integers(1, 12))), replace=False) if number % 6 else []
        )
        for place, label in zip(chosen, rng.choice(CLASSES, len(chosen), replace=False).tolist(), strict=True):
            (y, x), size = places[place], int(rng.integers(4, 13))
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + size, x : x + size] = shape(rng, size)
            pixels[mask > 0] = COLOURS[label]
            runs: Any = masks.encode(np.asfortranarray(mask))
            runs["counts"] = runs["counts"].decode()
            if mask.sum() == size * size:
                runs = [[x, y, x + size, y, x + size, y + size, x, y + size]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 2 * label + 3,
                    "bbox": [x, y, size, size],
                    "area": int(mask.sum()),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": runs,
                }
            )
        Image.fromarray(pixels).save(root / f"train/{number}.png")
    annotations.append({**annotations[0], "id": 100_000, "bbox": [3, 4, 0, 5]})
    images = [
        {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        for number, (height, width) in enumerate(sizes, 1)
    ]
    categories = [{"id": 2 * label + 3, "name": f"class {label}"} for label in range(CLASSES)]
    (root / "annotations").mkdir()
    table = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_train.json").write_text(json.dumps(table))
    pack(coco.find(root / "annotations/instances_train.json"), root / "packed", samples_per_shard=10)
    return root


def make_config(data: Path, folder: Path, name: str = "mask_rcnn", **task: object) -> Config:
    tree: dict[str, Any] = yaml.safe_load(write_config(data, folder).read_text())
    tree |= {"task": {"name": name, **task}, "augment": {}, "mix": {}}
    tree["data"] |= {"train": str(data), "val": None, "lanes": 4, "shuffle_window": 8}
    tree["image"] |= {"size": SIDE, "interpolation": "nearest"}
    tree["image"].pop("crop_pct")
    tree["train"] |= {"global_batch_size": 12}
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


def batches(
    chosen: Config, data: Path, count: int, world: World | None = None, first_step: int = 0
) -> list[MicroBatch]:
    feed = TrainFeed(chosen, ShardSet(data), world or World(), first_step=first_step)
    found = [feed.next()[0] for _ in range(count)]
    feed.close()
    return found


def colours(image: Tensor) -> np.ndarray:
    """[3, H, W] as the network sees it, with mean and deviation 0.5, back to [H, W, 3] uint8."""
    return (255 * (image * 0.5 + 0.5)).round().byte().permute(1, 2, 0).numpy()


def bounds(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


# Boxes and masks


def test_masks_match_image_pixels_after_crop_resize_and_flip(painted: Path, tmp_path: Path) -> None:
    """Cut, scaled, flipped: every single pixel. And of crowds and what is out of sight, none."""
    annotations = json.loads((painted / "annotations/instances_train.json").read_text())["annotations"]
    shards, seen, cut = ShardSet(painted / "packed"), 0, 0
    for batch in batches(make_config(painted / "packed", tmp_path, **CROP), painted / "packed", 10):
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        for i, (target, extent) in enumerate(zip(batch.targets, batch.extents, strict=True)):
            assert isinstance(target, Objects)
            assert target.boxes.dtype == torch.float32
            assert target.labels.dtype == torch.int64
            assert target.masks is not None
            assert target.masks.dtype == torch.uint8
            assert target.masks.shape == (len(target), *extent)
            assert (batch.images[i, :, extent[0] :] == 0).all()
            assert (batch.images[i, :, :, extent[1] :] == 0).all()
            image = colours(batch.images[i, :, : extent[0], : extent[1]])
            single = [
                (entry["category_id"] - 3) // 2
                for entry in annotations
                if entry["image_id"] == int(shards.key(int(batch.samples.shard[i]), int(batch.samples.row[i])))
                and not entry["iscrowd"]
                and min(entry["bbox"][2:]) > 0
            ]
            shown = [label for label in single if (image == COLOURS[label]).all(-1).any()]
            assert sorted(target.labels.tolist()) == sorted(shown)
            for label, mask in zip(target.labels.tolist(), target.masks.numpy(), strict=True):
                np.testing.assert_array_equal(mask > 0, (image == COLOURS[label]).all(-1))
                seen += 1
            cut += len(shown) < len(single)
    assert seen > 200
    assert cut > 10


def test_boxes_enclose_visible_masks(painted: Path, tmp_path: Path) -> None:
    """To within a pixel; where the window cuts an L, its box may reach beyond what is left of it."""
    seen = 0
    whole: dict[str, Any] = {"train_short_sides": [40, 64, 80]}
    for task in (whole, CROP):
        for batch in batches(make_config(painted / "packed", tmp_path, **task), painted / "packed", 6):
            for target, (height, width) in zip(batch.targets, batch.extents, strict=True):
                assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
                assert (target.boxes >= 0).all()
                assert (target.boxes <= torch.tensor([width, height, width, height])).all()
                for box, mask in zip(target.boxes.tolist(), target.masks.numpy(), strict=True):
                    left, top, right, bottom = np.subtract(bounds(mask), box)
                    assert min(left, top, -right, -bottom) > -1
                    is_cut = task is CROP and (min(box[:2]) <= 0 or box[2] >= width or box[3] >= height)
                    if not is_cut:
                        assert max(left, top, -right, -bottom) < 1
                        seen += 1
    assert seen > 250


def test_detr_targets_have_the_boxes_of_mask_rcnn_without_masks(painted: Path, tmp_path: Path) -> None:
    """DETR's, which has no masks, are Mask R-CNN's and those of whose masks nothing is seen."""
    with_masks = batches(make_config(painted / "packed", tmp_path, "mask_rcnn", **CROP), painted / "packed", 4)
    alone = batches(make_config(painted / "packed", tmp_path, "detr", **CROP), painted / "packed", 4)
    more = 0
    for one, other in zip(with_masks, alone, strict=True):
        assert torch.equal(one.images, other.images)
        for some, every in zip(one.targets, other.targets, strict=True):
            assert every.masks is None
            pairs = {(label, *box) for label, box in zip(every.labels.tolist(), every.boxes.tolist(), strict=True)}
            assert pairs >= {
                (label, *box) for label, box in zip(some.labels.tolist(), some.boxes.tolist(), strict=True)
            }
            more += len(every) - len(some)
    assert more < 20


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_clipped_to_the_image(flip: bool) -> None:
    transform = BoxTransform(RetinaNetConfig(), ImageConfig(size=100), 3)
    view = augment.whole_views(RetinaNetConfig(), ImageConfig(size=100), np.array([[50, 80]]))
    view = augment.dataclasses.replace(view, flip=np.array([flip]))
    assert view.extent.tolist() == [[100, 160]]
    entries = [
        {"id": 1, "label": 2, "bbox": [-5, 10, 15.5, 60], "area": 9, "iscrowd": 0},
        {"id": 2, "label": 1, "bbox": [70, 0, 10.02, 5], "area": 9, "iscrowd": 0},
        {"id": 3, "label": 0, "bbox": [10, 10, 20, 0], "area": 9, "iscrowd": 0},
        {"id": 4, "label": 0, "bbox": [10, 10, 20, 20], "area": 9, "iscrowd": 1},
    ]
    _, target = transform.training_target(encode(Annotated(1, 50, 80, entries)), view)
    expected = [[139, 20, 160, 100], [0, 0, 20, 10]] if flip else [[0, 20, 21, 100], [140, 0, 160, 10]]
    assert target.boxes.tolist() == expected
    assert target.labels.tolist() == [2, 1]


# What is drawn


def views(task: DetectionConfig, count: int, hw: tuple[int, int], size: int = 800) -> augment.Views:
    key = keys.key(0, Stream.AUGMENT, np.arange(count))
    return augment.detection_views(AugmentConfig(), task, ImageConfig(size=size), key, np.full((count, 2), hw))


def detr_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """As DETR's authors resize an image: the side to `short`, unless the other one gets longer than `long`."""
    small, large = sorted((height, width))
    if large / small * short > long:
        short = round(long * small / large)
    return (round(short * height / width), short) if width < height else (short, round(short * width / height))


@pytest.mark.parametrize("hw", [(480, 640), (427, 640), (640, 360), (200, 1000), (500, 500)])
def test_whole_image_resize_matches_detr(hw: tuple[int, int]) -> None:
    sides = tuple(range(480, 801, 32))
    seen = views(DetrConfig(train_short_sides=sides, long_side=1333), 3000, hw)
    assert (seen.shape == hw).all()
    assert (seen.anchor == 0).all()
    expected = {detr_size(*hw, short, 1333) for short in sides}
    found, counts = np.unique(seen.extent, axis=0, return_counts=True)
    assert len(found) == len(expected)
    for one, other in zip(sorted(map(tuple, found.tolist())), sorted(expected), strict=True):
        # Theirs may exceed the long side by a rounding of the short one, five times as long here.
        assert np.abs(np.subtract(one, other)).max() <= 2
    if len(expected) == len(sides):
        assert np.abs(counts / 3000 - 1 / len(sides)).max() < 0.02
    assert abs(seen.flip.mean() - 0.5) < 0.03
    assert (seen.canvas[0] % 32, seen.canvas[1] % 32) == (0, 0)
    assert (np.array(seen.canvas) - seen.extent.max(axis=0) < 32).all()


def test_short_side_defaults_to_evaluation_size() -> None:
    seen = views(RetinaNetConfig(), 10, (480, 640))
    assert seen.extent.tolist() == [[800, 1067]] * 10
    limited = views(RetinaNetConfig(long_side=900), 10, (480, 640))
    assert limited.extent.tolist() == [[675, 900]] * 10
    whole = augment.whole_views(RetinaNetConfig(), ImageConfig(size=800), np.array([(480, 640), (900, 300)]))
    assert whole.extent.tolist() == [[800, 1067], [1333, 444]]
    assert whole.canvas == (1344, 1088)


@pytest.mark.parametrize("hw", [(480, 640), (640, 427), (300, 1200)])
def test_random_crops_match_detr_distribution(hw: tuple[int, int]) -> None:
    """RandomResize([400, 500, 600]), RandomSizeCrop(384, 600): sides and places, in parts of the image."""
    count, generator = 4000, random.Random(0)
    seen = views(DetrConfig(crop_prob=1.0, train_short_sides=(480, 800), long_side=1333), count, hw)
    ours = np.concatenate([seen.shape / hw, seen.anchor / np.maximum(np.array(hw) - seen.shape, 1)], axis=1)
    theirs = []
    for _ in range(count):
        height, width = detr_size(*hw, generator.choice([400, 500, 600]), 10**9)
        w, h = (generator.randint(384, min(side, 600)) for side in (width, height))
        top, left = generator.randint(0, height - h), generator.randint(0, width - w)
        theirs.append((h / height, w / width, top / max(height - h, 1), left / max(width - w, 1)))
    np.testing.assert_allclose(np.corrcoef(ours.T), np.corrcoef(np.array(theirs).T), atol=0.08)
    for one, other in zip(ours.T, np.array(theirs).T, strict=True):
        # A place in an image that the window fills is no place.
        result: Any = ks_2samp(one[one < 1], other[other < 1])
        assert result.statistic < 0.05
        assert abs((one >= 1).mean() - (other >= 1).mean()) < 0.03
    assert (seen.anchor >= 0).all()
    assert (seen.anchor + seen.shape <= hw).all()
    fitted = [min(abs(s - min(shown)) for s in (480, 800)) for shown in seen.extent.tolist()]
    assert max(seen.extent.max(), 0) <= 1333
    assert np.mean(np.array(fitted) == 0) > 0.7


def test_crop_scale_and_flip_are_drawn_independently() -> None:
    seen = views(DetrConfig(crop_prob=0.5, train_short_sides=(480, 800)), 4000, (480, 640))
    cropped, large = (seen.shape < (480, 640)).any(axis=1), seen.extent.min(axis=1) > 600
    for one, other in ((cropped, large), (cropped, seen.flip), (large, seen.flip)):
        assert abs((one & other).mean() - one.mean() * other.mean()) < 0.02
        assert abs(one.mean() - 0.5) < 0.05


def test_crop_windows_stay_inside_images_of_any_size() -> None:
    rng, count = np.random.default_rng(0), 3000
    hw = np.concatenate([rng.integers(1, 2000, (count, 2)), [[1, 1], [1, 65535], [65535, 1], [3, 5]]])
    key = keys.key(0, Stream.AUGMENT, np.arange(len(hw)))
    for task in (
        DetrConfig(crop_prob=0.7),
        DetrConfig(crop_prob=1.0, crop_short_sides=(9,), crop_sides=(1, 3)),
    ):
        seen = augment.detection_views(AugmentConfig(), task, ImageConfig(size=64), key, hw)
        assert (seen.anchor >= 0).all()
        assert (seen.shape >= 1).all()
        assert (seen.anchor + seen.shape <= hw).all()
        assert (seen.extent >= 1).all()
        assert (seen.extent <= 107).all()
        share = ((seen.shape == hw).all(axis=1) & (hw.min(axis=1) > 700)).sum() / (hw.min(axis=1) > 700).sum()
        assert abs(share - (1 - task.crop_prob)) < 0.05


# On every world


def require_equal(one: MicroBatch, i: int, other: MicroBatch, j: int) -> None:
    height, width = one.extents[i]
    assert one.extents[i] == other.extents[j]
    assert torch.equal(one.images[i, :, :height, :width], other.images[j, :, :height, :width])
    assert torch.equal(one.targets[i].boxes, other.targets[j].boxes)
    assert torch.equal(one.targets[i].labels, other.targets[j].labels)
    assert torch.equal(one.targets[i].masks, other.targets[j].masks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_are_equal_on_every_world_size(painted: Path, tmp_path: Path, ranks: int) -> None:
    chosen, data = make_config(painted / "packed", tmp_path, **CROP), painted / "packed"
    whole = batches(chosen, data, 3, first_step=2)
    parts = [batches(chosen, data, 3, World(rank, ranks), first_step=2) for rank in range(ranks)]
    canvases = set()
    for step, batch in enumerate(whole):
        seen = 0
        for part in (of_rank[step] for of_rank in parts):
            canvases.add(part.images.shape[2:])
            for i in np.flatnonzero(part.weights.numpy()):
                place = int(np.flatnonzero(batch.samples.position == part.samples.position[i])[0])
                require_equal(part, int(i), batch, place)
                seen += 1
        assert seen == 12
    assert len(canvases) > 1, "batches are of several sizes"


def test_train_feed_resumes_at_a_later_step_with_the_same_batches(painted: Path, tmp_path: Path) -> None:
    chosen, data = make_config(painted / "packed", tmp_path, **CROP), painted / "packed"
    for one, other in zip(batches(chosen, data, 6)[4:], batches(chosen, data, 2, first_step=4), strict=True):
        assert torch.equal(one.images, other.images)
        assert np.array_equal(one.samples.id, other.samples.id)
        for i in range(12):
            require_equal(one, i, other, i)


@pytest.mark.parametrize("ranks", [1, 3])
def test_eval_feed_yields_each_whole_image_once(painted: Path, tmp_path: Path, ranks: int) -> None:
    data, reference = painted / "packed", COCO(painted / "annotations/instances_train.json")
    shards, chosen = ShardSet(data), make_config(data, tmp_path, short_side=48, long_side=100)
    seen = []
    for rank in range(ranks):
        for batch in EvalFeed(shards, World(rank, ranks), chosen.image, task=chosen.task, batch_size=3):
            assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
            for i in np.flatnonzero(batch.weights.numpy()):
                truth = batch.targets[i]
                assert isinstance(truth, Truth)
                (image,) = reference.loadImgs(truth.image_id)
                assert truth.size == (image["height"], image["width"])
                assert truth.extent == batch.extents[i]
                assert min(truth.extent) <= 48
                assert max(truth.extent) <= 100
                expected = reference.loadAnns(reference.getAnnIds(truth.image_id))
                assert [entry["id"] for entry in truth.annotations] == [entry["id"] for entry in expected]
                assert [entry["bbox"] for entry in truth.annotations] == [entry["bbox"] for entry in expected]
                rows, columns = ((np.arange(e) + 0.5) * s // e for e, s in zip(truth.extent, truth.size, strict=True))
                stored = np.asarray(Image.open(painted / "train" / image["file_name"]))
                shown = colours(batch.images[i, :, : truth.extent[0], : truth.extent[1]])
                np.testing.assert_array_equal(shown, stored[np.ix_(rows.astype(int), columns.astype(int))])
                seen.append(truth.image_id)
    assert sorted(seen) == list(range(1, COUNT + 1))


def test_blank_batch_has_no_objects(painted: Path, tmp_path: Path) -> None:
    for name, shape_of_masks in (("mask_rcnn", (0, SIDE, SIDE)), ("retinanet", None)):
        feed = TrainFeed(make_config(painted / "packed", tmp_path, name), ShardSet(painted / "packed"), World())
        (batch,) = feed.blank(0)
        feed.close()
        assert len(batch.targets) == 12
        assert all(len(target) == 0 and target.boxes.shape == (0, 4) for target in batch.targets)
        masks_of = batch.targets[0].masks
        assert (masks_of if masks_of is None else masks_of.shape) == shape_of_masks


# Bad input


def test_data_set_of_another_task_kind_is_rejected(painted: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds labelled images, but task retinanet needs images with objects"):
        TrainFeed(make_config(digits / "train", tmp_path, "retinanet"), ShardSet(digits / "train"), World())
    with pytest.raises(InputError, match="holds images with objects, but task classification needs labelled images"):
        EvalFeed(ShardSet(painted / "packed"), World(), ImageConfig(size=32), batch_size=4)


def without_masks(painted: Path, root: Path, images: Iterable[int]) -> Path:
    """The data set again, in one shard, without masks for these images."""
    table, images = json.loads((painted / "annotations/instances_train.json").read_text()), set(images)
    for entry in table["annotations"]:
        if entry["image_id"] in images:
            del entry["segmentation"]
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_train.json").write_text(json.dumps(table))
    (root / "train").symlink_to(painted / "train")
    pack(coco.find(root / "annotations/instances_train.json"), root / "packed", samples_per_shard=100)
    return root / "packed"


def test_data_without_masks_is_rejected_for_mask_rcnn_only(painted: Path, tmp_path: Path) -> None:
    data = without_masks(painted, tmp_path / "none", range(1, COUNT + 1))
    with pytest.raises(InputError, match=r"annotation \d+ has no segmentation, .* task mask_rcnn .*retinanet or detr"):
        TrainFeed(make_config(data, tmp_path), ShardSet(data), World())
    assert batches(make_config(data, tmp_path, "detr"), data, 1)[0].targets


def test_sample_without_masks_is_skipped_and_reported(painted: Path, tmp_path: Path) -> None:
    """One that is not among the first."""
    whole = ShardSet(without_masks(painted, tmp_path / "whole", []))
    key = next(key for key in (whole.key(0, row) for row in range(25, COUNT)) if int(key) % 6)
    data = without_masks(painted, tmp_path / "some", [int(key)])
    shards = ShardSet(data)
    quarantine = Quarantine(shards, tmp_path / "quarantine.jsonl")
    feed = TrainFeed(make_config(data, tmp_path), shards, World(), quarantine=quarantine)
    seen = {shards.key(0, int(row)) for _ in range(6) for row in feed.next()[0].samples.row}
    feed.close()
    assert len(seen) == COUNT - 1
    assert key not in seen
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == key
    assert "has no segmentation, which task mask_rcnn learns from" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (b"{}", "its objects: no objects in JSON"),
        (encode(Annotated(1, 50, 79, [])), "its objects are of 79 × 50 pixels, but it is larger"),
        (
            encode(Annotated(1, 50, 80, [{"id": 7, "label": 3, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}])),
            "its objects: annotation 7: label 3 is not below the 3 classes",
        ),
    ],
)
def test_annotation_that_does_not_fit_its_image_is_corrupt(annotation: bytes, reason: str) -> None:
    transform = BoxTransform(RetinaNetConfig(), ImageConfig(size=100), 3)
    view = transform.evaluation_views(np.array([[50, 80]]))
    for target in (transform.training_target, transform.evaluation_target):
        with pytest.raises(CorruptSampleError, match=reason):
            target(annotation, view)


# Shown


def test_preview_draws_objects_in_class_colours(painted: Path, tmp_path: Path) -> None:
    scene_layouts.write_dataset(tmp_path / "scenes", {"train": 12, "val": 0})
    path = tmp_path / "scenes/coco/annotations/instances_train.json"
    chosen = make_config(painted / "packed", tmp_path, **CROP)
    # Packed on first use.
    data = chosen.data.model_copy(update={"train": (SourceConfig(path=str(path)),), "cache": str(tmp_path / "cache")})
    result = preview(chosen.model_copy(update={"data": data}), open_training(data), tmp_path / "preview.png")
    assert result == {"sheet": str(tmp_path / "preview.png"), "samples": 6, "views": 6}
    pixels = np.asarray(Image.open(tmp_path / "preview.png")).reshape(-1, 3)
    found = sum(int((pixels == colour).all(axis=1).sum()) for colour in palette(10))
    assert found > 2000, "boxes and their labels are in the colours of classes"
