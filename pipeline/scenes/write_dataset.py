"""Writes scenes to files in the layouts of two public data sets, and crops of their digits.

DIR/ATTRIBUTION.txt
DIR/ade20k/objectInfo150.txt                       the classes, background first
DIR/ade20k/images/SPLIT/scene_00000001.jpg         SPLIT is training or validation
DIR/ade20k/annotations/SPLIT/scene_00000001.png    8 bits a pixel: 0 no label, 1 background, 2 … 11 digits
DIR/coco/SPLIT/scene_00000001.jpg                  the same images; SPLIT is train or val
DIR/coco/annotations/instances_SPLIT.json
DIR/crops/SPLIT/NAME/scene_00000001_2.jpg          each digit with its surroundings; SPLIT is train or val
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import files
from pipeline.scenes import photographs
from pipeline.scenes.coco_masks import box, polygons, rle
from pipeline.scenes.compose_scene import ALL_DIGITS, NAMES, SCENE_PX, Instance, Scene, compose
from pipeline.scenes.photographs import Split

BACKGROUND = "background"
CATEGORY_IDS = (1, 2, 3, 4, 6, 7, 8, 10, 11, 13)
"""The category ids of the digits 0 … 9. They have gaps, as COCO's have."""
JPEG_QUALITY = 90
# The side of a digit's crop, in units of its box's longer side.
_CROP_SCALE = 1.3

_ADE20K: dict[Split, str] = {"train": "training", "val": "validation"}


def write_dataset(
    out: Path,
    counts: dict[Split, int],
    seed: int = 0,
    side_px: tuple[int, int] = SCENE_PX,
    digits: range = ALL_DIGITS,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Writes the given number of scenes of each split into a new folder, and calls `advance` after each scene.

    Returns the number of COCO annotations of each split.
    """
    statistics = _ClassStatistics((BACKGROUND, *NAMES[digits.start : digits.stop]))
    tables: dict[Split, dict[str, Any]] = {split: _make_table(digits) for split in counts}
    for split, count in counts.items():
        folders = (
            out / "ade20k/images" / _ADE20K[split],
            out / "ade20k/annotations" / _ADE20K[split],
            out / "coco" / split,
        )
        for folder in folders:
            folder.mkdir(parents=True)
        images, maps, copies = folders
        for number in range(1, count + 1):
            scene = compose(
                seed,
                split,
                number,
                side_px,
                digits,
            )
            name = f"scene_{number:08d}"
            image_path = images / f"{name}.jpg"
            Image.fromarray(scene.image).save(image_path, quality=JPEG_QUALITY)
            Image.fromarray(scene.classes).save(maps / f"{name}.png")
            # Both layouts have the same images.
            files.link(image_path, copies / image_path.name)
            _write_crops(scene, out / "crops" / split, name)
            statistics.add(split, scene)
            _add_scene(tables[split], number, image_path.name, scene)
            advance()
    folder = out / "coco/annotations"
    folder.mkdir(parents=True)
    for split, table in tables.items():
        (folder / f"instances_{split}.json").write_text(json.dumps(table) + "\n")
    (out / "ade20k/objectInfo150.txt").write_text(statistics.table())
    (out / "ATTRIBUTION.txt").write_text(photographs.attribution())
    return {split: len(table["annotations"]) for split, table in tables.items()}


class _ClassStatistics:
    """Counts the pixels and images of each class for ADE20K's list of classes."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        # The pixels of each class in training, and the images of each split that show it.
        self._pixels = np.zeros(len(classes), np.int64)
        self._images = {split: np.zeros(len(classes), np.int64) for split in _ADE20K}

    def add(self, split: Split, scene: Scene) -> None:
        counts = np.bincount(scene.classes.ravel(), minlength=len(self._classes) + 1)
        # The value 0 is no label.
        pixels = counts[1:]
        self._images[split] += pixels > 0
        if split == "train":
            self._pixels += pixels

    def table(self) -> str:
        shares = self._pixels / max(self._pixels.sum(), 1)
        lines = ["Idx\tRatio\tTrain\tVal\tName"]
        for label, name in enumerate(self._classes):
            train = self._images["train"][label]
            val = self._images["val"][label]
            lines.append(f"{label + 1}\t{shares[label]:.4f}\t{train}\t{val}\t{name}")
        return "\n".join(lines) + "\n"


def _make_table(digits: range) -> dict[str, Any]:
    """Returns the contents of instances_SPLIT.json before any image is added."""
    licenses = []
    for number, photograph in enumerate(photographs.PHOTOGRAPHS, 1):
        license = {
            "id": number,
            "name": f"{photograph.licence}: {photograph.author}",
            "url": photograph.licence_url,
        }
        licenses.append(license)
    categories = []
    for digit in digits:
        category = {
            "id": CATEGORY_IDS[digit],
            "name": NAMES[digit],
            "supercategory": "digit",
        }
        categories.append(category)
    return {
        "info": {
            "description": "handwritten digits on photographs",
            "version": "1",
        },
        "licenses": licenses,
        "categories": categories,
        "images": [],
        "annotations": [],
    }


def _add_scene(
    table: dict[str, Any],
    number: int,
    file_name: str,
    scene: Scene,
) -> None:
    height, width = scene.classes.shape
    image = {
        "id": number,
        "file_name": file_name,
        "height": height,
        "width": width,
        "license": photographs.PHOTOGRAPHS.index(scene.photograph) + 1,
    }
    table["images"].append(image)
    annotations = table["annotations"]
    for instance in scene.instances:
        annotations.append(_make_annotation(len(annotations) + 1, number, instance))


def _make_annotation(number: int, image: int, instance: Instance) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": CATEGORY_IDS[instance.digit],
        "bbox": list(box(instance.mask)),
        "area": int(instance.mask.sum()),
        "iscrowd": int(instance.is_crowd),
        "segmentation": rle(instance.mask) if instance.is_crowd else polygons(instance.mask),
    }


def _write_crops(scene: Scene, folder: Path, name: str) -> None:
    for number, instance in enumerate(scene.instances):
        if instance.is_crowd:
            continue
        left, top, width, height = box(instance.mask)
        radius = round(_CROP_SCALE * max(width, height) / 2)
        y = top + height // 2
        x = left + width // 2
        # A slice ends at the image's edge by itself, but a negative start would count from the end.
        first_row = max(y - radius, 0)
        first_column = max(x - radius, 0)
        crop = scene.image[first_row : y + radius, first_column : x + radius]
        path = folder / NAMES[instance.digit] / f"{name}_{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path, quality=JPEG_QUALITY)
