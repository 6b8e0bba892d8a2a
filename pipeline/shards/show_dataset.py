"""What a data set holds, for a person: counts, balance, sizes, and a sheet of random samples.

    indices ──▶ counts and percentiles ──▶ summary ──▶ text
    some random samples ──▶ contact sheet

Sizes are read from the indices, so only the pictures of the sheet are opened; and some random annotations, where
classes are of pixels or objects.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline import keys
from pipeline.pictures.boxes import draw_boxes
from pipeline.pictures.contact_sheet import Sheet
from pipeline.pictures.palette import colourise
from pipeline.redact import printable, redact
from pipeline.shards import images, object_annotations
from pipeline.shards.filesystems import split_query
from pipeline.shards.images import BadImageError
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.shards.object_annotations import Annotated, BadObjectsError
from pipeline.shards.store import Cache

COLUMNS, ROWS = 8, 5
MAP_COLUMNS, MAP_ROWS, MAP_TILE_PX = 4, 6, 320
NUM_MAPS, NUM_ANNOTATED = 500, 2000
"""Maps whose pixels, and images whose objects are counted; all, where there are no more."""
SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""Areas below which COCO calls an object small, and medium."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)

_CACHE_BYTES = 64 << 20  # for the indices of a remote data set; of its shards only some samples are wanted


def show_dataset(root: str | Path, sheet: Path, seed: int = 0) -> dict[str, Any]:
    """Summarise the data set at `root` and draw a contact sheet of random samples into the PNG file `sheet`.

    Raises InputError where the data set cannot be read or the sheet not written.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(root, cache=Cache(folder, _CACHE_BYTES))
        summary = _summary(shards, seed)
        draw = {None: _draw_sheet, "semantic": _draw_maps, "objects": _draw_objects}[shards.annotations]
        picture = draw(shards, Path(split_query(str(root))[0]).absolute().name, seed, shards.attribution)
        shards.close()
    picture.save(sheet)
    return {"data": redact(str(root)), **summary, "sheet": str(sheet)}


def _summary(shards: ShardSet, seed: int) -> dict[str, Any]:
    counts = np.zeros(len(shards.classes), np.int64)
    sizes = np.empty((3, len(shards)), np.uint32)  # short side, long side, bytes
    start = 0
    for number, samples in enumerate(shards.shard_samples.tolist()):
        records = shards.index(number)
        counts += np.bincount(records["label"], minlength=len(counts))
        sides = records["height"], records["width"]
        sizes[:, start : start + samples] = np.minimum(*sides), np.maximum(*sides), records["size"]
        start += samples
    if shards.annotations is None:
        balance = _sample_balance(shards.classes, counts)
    else:
        balance = {"semantic": _pixel_balance, "objects": _object_balance}[shards.annotations](shards, seed)
    return {
        "samples": len(shards),
        "shards": len(shards.shard_samples),
        "classes": len(shards.classes),
        "bytes": int(sizes[2].sum(dtype=np.int64)),
        "digest": shards.digest,
        **balance,
        "short_side_px": _percentiles(sizes[0]),
        "long_side_px": _percentiles(sizes[1]),
        "image_bytes": _percentiles(sizes[2]),
    }


def _sample_balance(classes: list[str], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    named = _by_size(classes, counts)
    return {
        "samples_per_class": {"min": named[-1][1], "median": float(np.median(counts)), "max": named[0][1]},
        **_extremes(named),
    }


def _pixel_balance(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Of `maps_read` random maps: which part of the pixels has a class, and each class's part of these."""
    counts, num_pixels, num_maps = np.zeros(256, np.int64), 0, 0
    for shard, row in sorted(_choose(shards, seed, NUM_MAPS)):
        if (labels := _labels(shards, shard, row)) is not None:
            counts += np.bincount(labels.ravel(), minlength=256)
            num_pixels += labels.size
            num_maps += 1
    counts = counts[1 : len(shards.classes) + 1]
    shares = counts / max(counts.sum(), 1)
    named = _by_size(shards.classes, shares)
    return {
        "annotations": shards.annotations,
        "maps_read": num_maps,
        "labelled_share": float(counts.sum() / max(num_pixels, 1)),
        "pixel_share_per_class": {"min": named[-1][1], "median": float(np.median(shares)), "max": named[0][1]},
        **_extremes(named),
    }


def _object_balance(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Of the objects of `images_read` random images, without crowds: how many of which class and size."""
    read = [_objects(shards, shard, row) for shard, row in sorted(_choose(shards, seed, NUM_ANNOTATED))]
    found = [annotated.annotations for annotated in read if annotated]
    single = [[entry for entry in annotations if not entry["iscrowd"]] for annotations in found]
    labels = np.array([entry["label"] for entries in single for entry in entries], np.int64)
    areas = np.array([entry["area"] for entries in single for entry in entries], np.float64)
    per_image = np.array([len(entries) for entries in single] or [0])
    sizes = np.bincount(np.digitize(areas, (SMALL_PX, MEDIUM_PX)), minlength=3).tolist()
    named = _by_size(shards.classes, np.bincount(labels, minlength=len(shards.classes)))
    return {
        "annotations": shards.annotations,
        "images_read": len(found),
        "objects": len(labels),
        "objects_with_mask": sum("segmentation" in entry for entries in single for entry in entries),
        "crowds": sum(map(len, found)) - len(labels),
        "objects_per_image": {
            "min": int(per_image.min()),
            "mean": float(per_image.mean()),
            "max": int(per_image.max()),
        },
        "objects_by_size": dict(zip(("small", "medium", "large"), sizes, strict=True)),
        **_extremes(named),
    }


def _by_size(classes: list[str], sizes: npt.NDArray[Any]) -> list[tuple[str, Any]]:
    return [(classes[label], sizes[label].item()) for label in np.argsort(-sizes, kind="stable").tolist()]


def _extremes(named: list[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest and the smallest classes, each class once: of few there may be no more than the largest."""
    return {"largest_classes": dict(named[:5]), "smallest_classes": dict(named[:4:-1][:5])}


def _labels(shards: ShardSet, shard: int, row: int) -> npt.NDArray[np.uint8] | None:
    """A sample's map as it is stored, [height, width]; None where it is damaged."""
    try:
        return images.decode_map(shards.read_annotation(shard, row))
    except (CorruptSampleError, BadImageError):
        return None


def _objects(shards: ShardSet, shard: int, row: int) -> Annotated | None:
    """What is known of a sample's objects; None where it is damaged."""
    try:
        return object_annotations.decode(shards.read_annotation(shard, row), len(shards.classes))
    except (CorruptSampleError, BadObjectsError):
        return None


def _percentiles(values: npt.NDArray[np.uint32]) -> dict[str, int]:
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def table(summary: dict[str, Any]) -> str:
    """The summary as text of a few lines."""
    lines = [
        f"{summary['data']}: {summary['samples']:,} samples of {summary['classes']:,} classes "
        f"in {summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB of images",
        "",
        *_BALANCE_LINES[summary.get("annotations")](summary),
        "",
        " " * 12 + "".join(f"{'min' if p == 0 else 'max' if p == 100 else f'{p} %':>9}" for p in PERCENTILES),
    ]
    for title, name in (("short side", "short_side_px"), ("long side", "long_side_px"), ("bytes", "image_bytes")):
        lines.append(f"{title:12}" + "".join(f"{value:9,}" for value in summary[name].values()))
    return "\n".join(lines)


def _sample_lines(summary: dict[str, Any]) -> list[str]:
    balance = summary["samples_per_class"]
    return [
        f"samples per class   min {balance['min']:,}   median {balance['median']:,g}   max {balance['max']:,}",
        *_class_lines("largest", summary["largest_classes"], ","),
        *_class_lines("smallest", summary["smallest_classes"], ","),
    ]


def _pixel_lines(summary: dict[str, Any]) -> list[str]:
    balance = summary["pixel_share_per_class"]
    return [
        f"{summary['labelled_share']:.1%} of the pixels of {summary['maps_read']:,} maps have a class; of these",
        f"pixels per class   min {balance['min']:.3%}   median {balance['median']:.3%}   max {balance['max']:.3%}",
        *_class_lines("largest", summary["largest_classes"], ".3%"),
        *_class_lines("smallest", summary["smallest_classes"], ".3%"),
    ]


def _object_lines(summary: dict[str, Any]) -> list[str]:
    each, sizes, count = summary["objects_per_image"], summary["objects_by_size"], max(summary["objects"], 1)
    shares = "   ".join(f"{name} {number:,} ({number / count:.0%})" for name, number in sizes.items())
    return [
        f"{summary['objects']:,} objects in {summary['images_read']:,} images, "
        f"{summary['objects_with_mask']:,} of them with masks; {summary['crowds']:,} crowds beside them",
        f"objects an image   min {each['min']:,}   mean {each['mean']:.1f}   max {each['max']:,}",
        f"by COCO's sizes    {shares}",
        *_class_lines("largest", summary["largest_classes"], ","),
        *_class_lines("smallest", summary["smallest_classes"], ","),
    ]


_BALANCE_LINES = {None: _sample_lines, "semantic": _pixel_lines, "objects": _object_lines}


def _class_lines(title: str, classes: dict[str, Any], form: str) -> list[str]:
    return [
        f"  {title if row == 0 else '':10}{size:9{form}}  {printable(name)}"
        for row, (name, size) in enumerate(classes.items())
    ]


def _draw_sheet(shards: ShardSet, name: str, seed: int, note: str | None) -> Sheet:
    chosen = _choose(shards, seed, COLUMNS * ROWS)
    about = f"{len(chosen)} of {len(shards):,} samples at random (seed {seed}), {len(shards.classes):,} classes"
    sheet = Sheet(name, about, columns=COLUMNS, count=len(chosen), num_details=1, note=note)
    for shard, row in chosen:
        record = shards.index(shard)[row]
        size = f"class {record['label']} · {record['width']} × {record['height']}"
        sheet.add(_picture(shards, shard, row), shards.classes[record["label"]], size)
    return sheet


def _draw_maps(shards: ShardSet, name: str, seed: int, note: str | None) -> Sheet:
    """Each image with its map below or beside it, and the classes that most of its pixels have."""
    chosen = _choose(shards, seed, MAP_COLUMNS * MAP_ROWS)
    about = (
        f"{len(chosen)} of {len(shards):,} samples at random (seed {seed}), {len(shards.classes):,} classes of pixels"
    )
    sheet = Sheet(name, about, columns=MAP_COLUMNS, count=len(chosen), num_details=1, tile_px=MAP_TILE_PX, note=note)
    for shard, row in chosen:
        record = shards.index(shard)[row]
        picture, labels = _picture(shards, shard, row), _labels(shards, shard, row)
        size = f"{record['width']} × {record['height']}"
        if picture is None or labels is None:
            sheet.add(None, "", size)
            continue
        counts = np.bincount(labels.ravel(), minlength=256)[1 : len(shards.classes) + 1]
        largest = [label for label in np.argsort(-counts, kind="stable")[:5].tolist() if counts[label]]
        caption = ", ".join(f"{shards.classes[label]} {counts[label] / labels.size:.0%}" for label in largest)
        sheet.add(_beside(picture, colourise(labels - 1, len(shards.classes))), caption, size)
    return sheet


def _draw_objects(shards: ShardSet, name: str, seed: int, note: str | None) -> Sheet:
    """Each image with its boxes, and its masks where it has any."""
    chosen = _choose(shards, seed, MAP_COLUMNS * MAP_ROWS)
    about = (
        f"{len(chosen)} of {len(shards):,} samples at random (seed {seed}), {len(shards.classes):,} classes of objects"
    )
    sheet = Sheet(name, about, columns=MAP_COLUMNS, count=len(chosen), num_details=1, tile_px=MAP_TILE_PX, note=note)
    for shard, row in chosen:
        record = shards.index(shard)[row]
        picture, annotated = _picture(shards, shard, row), _objects(shards, shard, row)
        size = f"{record['width']} × {record['height']}"
        if picture is None or annotated is None:
            sheet.add(None, "", size)
            continue
        counts = Counter((entry["label"], entry["iscrowd"]) for entry in annotated.annotations)
        caption = ", ".join(
            f"{count} {'crowds of ' if crowd else ''}{shards.classes[label]}"
            for (label, crowd), count in counts.most_common()
        )
        sheet.add(draw_annotated(picture, annotated, shards.classes, MAP_TILE_PX), caption or "no objects", size)
    return sheet


def draw_annotated(picture: Image.Image, annotated: Annotated, classes: list[str], side_px: int) -> Image.Image:
    """A copy of a stored image, its longer side `side_px`, with its objects and crowds, small ones on top."""
    entries, size = sorted(annotated.annotations, key=lambda entry: entry["area"]), (annotated.height, annotated.width)
    boxes, labels = [entry["bbox"] for entry in entries], [entry["label"] for entry in entries]
    masks = (
        object_annotations.mask(entry, *size) if "segmentation" in entry else np.zeros(size, np.uint8)
        for entry in entries
    )
    return draw_boxes(picture, boxes, labels, None, masks, classes, side_px=side_px)


def _picture(shards: ShardSet, shard: int, row: int) -> Image.Image | None:
    """None where it is damaged."""
    try:
        return images.decode(shards.read(shard, row))
    except (CorruptSampleError, BadImageError):
        return None


def _beside(one: Image.Image, other: Image.Image) -> Image.Image:
    """Two pictures of one size as one, the second to the right of a high one, or below a wide one."""
    step = (one.width, 0) if one.height > one.width else (0, one.height)
    both = Image.new("RGB", (one.width + step[0], one.height + step[1]))
    both.paste(one)
    both.paste(other, step)
    return both


def _choose(shards: ShardSet, seed: int, count: int) -> list[tuple[int, int]]:
    """Shard and row of random samples, those of a class side by side."""
    generator = keys.generator(keys.key(seed, keys.Stream.SHOW))
    samples = generator.choice(len(shards), min(len(shards), count), replace=False)
    ends = np.cumsum(shards.shard_samples)
    numbers = np.searchsorted(ends, samples, side="right")
    rows = samples - (ends - shards.shard_samples)[numbers]
    order = np.argsort(shards.records(numbers, rows)["label"], kind="stable")
    return list(zip(numbers[order].tolist(), rows[order].tolist(), strict=True))
