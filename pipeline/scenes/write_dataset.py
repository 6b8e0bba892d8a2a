"""Scenes as files, in the layouts of two public data sets, and their digits one by one:

DIR/ATTRIBUTION.txt
DIR/ade20k/objectInfo150.txt                       the classes, background first
DIR/ade20k/images/SPLIT/scene_00000001.jpg         SPLIT is training or validation
DIR/ade20k/annotations/SPLIT/scene_00000001.png    8 bits: 0 nobody's, 1 background, 2 … 11 digits
DIR/coco/SPLIT/scene_00000001.jpg                  the same images; SPLIT is train or val
DIR/coco/annotations/instances_SPLIT.json
DIR/crops/SPLIT/NAME/scene_00000001_2.jpg          each digit with what is around it; SPLIT is train or val
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
"""Of the digits; as COCO's, not all numbers are used."""
JPEG_QUALITY = 90
_AROUND = 1.3  # side of a digit's crop, in lengths of its box's longer side

_ADE20K: dict[Split, str] = {"train": "training", "val": "validation"}


def write_dataset(
    out: Path,
    counts: dict[Split, int],
    seed: int = 0,
    side_px: tuple[int, int] = SCENE_PX,
    digits: range = ALL_DIGITS,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write so many scenes of each split into a new folder; how many there are of what. Calls `advance` after each."""
    seen = _Pixels((BACKGROUND, *NAMES[digits.start : digits.stop]))
    tables: dict[Split, dict[str, Any]] = {split: _table(digits) for split in counts}
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
            scene, name = compose(seed, split, number, side_px, digits), f"scene_{number:08d}"
            Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=JPEG_QUALITY)
            Image.fromarray(scene.classes).save(maps / f"{name}.png")
            files.link(images / f"{name}.jpg", copies / f"{name}.jpg")
            _crop(scene, out / "crops" / split, name)
            seen.add(split, scene)
            _describe(tables[split], number, f"{name}.jpg", scene)
            advance()
    folder = out / "coco/annotations"
    folder.mkdir(parents=True)
    for split, table in tables.items():
        (folder / f"instances_{split}.json").write_text(json.dumps(table) + "\n")
    (out / "ade20k/objectInfo150.txt").write_text(seen.table())
    (out / "ATTRIBUTION.txt").write_text(photographs.attribution())
    return {split: len(table["annotations"]) for split, table in tables.items()}


class _Pixels:
    """How much there is of each class, as ADE20K's list of classes tells it."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes, self._pixels = classes, np.zeros(len(classes), np.int64)
        self._images = {split: np.zeros(len(classes), np.int64) for split in _ADE20K}

    def add(self, split: Split, scene: Scene) -> None:
        pixels = np.bincount(scene.classes.ravel(), minlength=len(self._classes) + 1)[1:]
        self._images[split] += pixels > 0
        if split == "train":
            self._pixels += pixels

    def table(self) -> str:
        shares = self._pixels / max(self._pixels.sum(), 1)
        lines = ["Idx\tRatio\tTrain\tVal\tName"]
        for label, name in enumerate(self._classes):
            train, val = (self._images[split][label] for split in _ADE20K)
            lines.append(f"{label + 1}\t{shares[label]:.4f}\t{train}\t{val}\t{name}")
        return "\n".join(lines) + "\n"


def _table(digits: range) -> dict[str, Any]:
    """What instances_SPLIT.json holds, without images."""
    names = [(CATEGORY_IDS[digit], NAMES[digit]) for digit in digits]
    return {
        "info": {"description": "handwritten digits on photographs", "version": "1"},
        "licenses": [
            {"id": number, "name": f"{photograph.licence}: {photograph.author}", "url": photograph.licence_url}
            for number, photograph in enumerate(photographs.PHOTOGRAPHS, 1)
        ],
        "categories": [{"id": number, "name": name, "supercategory": "digit"} for number, name in names],
        "images": [],
        "annotations": [],
    }


def _describe(table: dict[str, Any], number: int, file_name: str, scene: Scene) -> None:
    height, width = scene.classes.shape
    licence = photographs.PHOTOGRAPHS.index(scene.photograph) + 1
    image = {"id": number, "file_name": file_name, "height": height, "width": width, "license": licence}
    table["images"].append(image)
    for instance in scene.instances:
        identity = {"id": len(table["annotations"]) + 1, "image_id": number}
        table["annotations"].append(identity | _annotation(instance))


def _annotation(instance: Instance) -> dict[str, Any]:
    return {
        "category_id": CATEGORY_IDS[instance.digit],
        "bbox": list(box(instance.mask)),
        "area": int(instance.mask.sum()),
        "iscrowd": int(instance.is_crowd),
        "segmentation": rle(instance.mask) if instance.is_crowd else polygons(instance.mask),
    }


def _crop(scene: Scene, folder: Path, name: str) -> None:
    for number, instance in enumerate(scene.instances):
        if instance.is_crowd:
            continue
        left, top, width, height = box(instance.mask)
        around = round(_AROUND * max(width, height) / 2)
        y, x = top + height // 2, left + width // 2
        cut = scene.image[max(y - around, 0) : y + around, max(x - around, 0) : x + around]
        path = folder / NAMES[instance.digit] / f"{name}_{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cut).save(path, quality=JPEG_QUALITY)
