"""Summarises a data set for a person: counts, class balance, sizes, and a contact sheet of random samples.

    indices ──▶ counts and percentiles ──▶ summary ──▶ text
    some random samples ──▶ contact sheet

Sizes are read from the indices. Only the samples of the sheet are opened, and, where a data set has annotations, a
random selection of these.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

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


class _SheetLayout(NamedTuple):
    columns: int
    rows: int
    tile_px: int
    classes: str
    """The words for the classes in the sheet's subtitle."""


_SHEET_LAYOUTS = {
    None: _SheetLayout(columns=8, rows=5, tile_px=150, classes="classes"),
    "semantic": _SheetLayout(columns=4, rows=6, tile_px=320, classes="classes of pixels"),
    "objects": _SheetLayout(columns=4, rows=6, tile_px=320, classes="classes of objects"),
}

NUM_MAPS = 500
"""The number of maps whose pixels are counted; all maps of a smaller data set."""
NUM_ANNOTATED = 2000
"""The number of images whose objects are counted; all images of a smaller data set."""
SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""The areas below which COCO calls an object small, and medium."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_PERCENTILE_TITLES = ("min", "5 %", "25 %", "50 %", "75 %", "95 %", "max")

_HEADING = "{data}: {samples:,} samples of {classes:,} classes in {shards:,} shards, {megabytes:,.1f} MB of images"
_OBJECTS = (
    "{objects:,} objects in {images_read:,} images, {objects_with_mask:,} of them with masks; "
    "{crowds:,} crowds beside them"
)

Array = npt.NDArray[Any]

Tile = tuple[Image.Image | None, str]
"""The picture and caption of a sample on the sheet; no picture for a damaged one."""

# The cache holds the indices of a remote data set. Only a few samples of its shards are read.
_CACHE_BYTES = 64 << 20


def show_dataset(root: str | Path, sheet: Path, seed: int = 0) -> dict[str, Any]:
    """Summarises the data set at `root` and draws a contact sheet of random samples into the PNG file `sheet`.

    Raises InputError where the data set cannot be read or the sheet cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(root, cache=Cache(folder, _CACHE_BYTES))
        summary = summarise(shards, seed)
        location, _ = split_query(str(root))
        picture = _draw_sheet(shards, Path(location).absolute().name, seed)
        shards.close()
    # The cache is removed first: a sheet that cannot be written leaves nothing behind.
    picture.save(sheet)
    return {"data": redact(str(root)), **summary, "sheet": str(sheet)}


def summarise(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Returns counts, class balance and sizes; of annotations those of a random choice."""
    counts = np.zeros(shards.manifests[0].num_labels, np.int64)
    # The rows are short side, long side and bytes.
    sizes = np.empty((3, len(shards)), np.uint32)
    start = 0
    for number, samples in enumerate(shards.shard_samples.tolist()):
        records = shards.index(number)
        counts += np.bincount(records["label"], minlength=len(counts))
        end = start + samples
        sizes[0, start:end] = np.minimum(records["height"], records["width"])
        sizes[1, start:end] = np.maximum(records["height"], records["width"])
        sizes[2, start:end] = records["size"]
        start = end
    if shards.annotations == "semantic":
        balance = _measure_pixel_balance(shards, seed)
    elif shards.annotations == "objects":
        balance = _measure_object_balance(shards, seed)
    elif shards.annotations == "unlabelled":
        balance = {"annotations": shards.annotations}
    else:
        balance = _measure_sample_balance(shards.classes, counts)
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


def _measure_sample_balance(classes: list[str], counts: Array) -> dict[str, Any]:
    by_size = _sort_by_size(classes, counts)
    return {
        "samples_per_class": _spread(by_size, counts),
        **_extremes(by_size),
    }


def _measure_pixel_balance(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Returns the share of pixels that have a class in `maps_read` random maps, and each class's share of these."""
    counts = np.zeros(256, np.int64)
    num_pixels = 0
    num_maps = 0
    # In the order of the tars, which a remote or spinning disk reads faster.
    for shard, row in sorted(_choose(shards, seed, NUM_MAPS)):
        labels = _read_labels(shards, shard, row)
        if labels is None:
            continue
        counts += np.bincount(labels.ravel(), minlength=256)
        num_pixels += labels.size
        num_maps += 1
    counts = counts[1 : len(shards.classes) + 1]
    num_labelled = counts.sum()
    shares = counts / max(num_labelled, 1)
    by_size = _sort_by_size(shards.classes, shares)
    return {
        "annotations": shards.annotations,
        "maps_read": num_maps,
        "labelled_share": float(num_labelled / max(num_pixels, 1)),
        "pixel_share_per_class": _spread(by_size, shares),
        **_extremes(by_size),
    }


def _measure_object_balance(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Returns how many objects of which class and size `images_read` random images have, crowds not counted."""
    entries: list[dict[str, Any]] = []
    per_image: list[int] = []
    num_crowds = 0
    for shard, row in sorted(_choose(shards, seed, NUM_ANNOTATED)):
        annotated = _read_objects(shards, shard, row)
        if annotated is None:
            continue
        single = [entry for entry in annotated.annotations if not entry["iscrowd"]]
        entries += single
        per_image.append(len(single))
        num_crowds += len(annotated.annotations) - len(single)
    labels = np.array([entry["label"] for entry in entries], np.int64)
    areas = np.array([entry["area"] for entry in entries], np.float64)
    sizes = np.bincount(np.digitize(areas, (SMALL_PX, MEDIUM_PX)), minlength=3).tolist()
    counts = np.bincount(labels, minlength=len(shards.classes))
    objects = np.array(per_image or [0])
    return {
        "annotations": shards.annotations,
        "images_read": len(per_image),
        "objects": len(entries),
        "objects_with_mask": sum("segmentation" in entry for entry in entries),
        "crowds": num_crowds,
        "objects_per_image": {
            "min": int(objects.min()),
            "mean": float(objects.mean()),
            "max": int(objects.max()),
        },
        "objects_by_size": dict(zip(("small", "medium", "large"), sizes, strict=True)),
        **_extremes(_sort_by_size(shards.classes, counts)),
    }


def _sort_by_size(classes: list[str], sizes: Array) -> list[tuple[str, Any]]:
    order = np.argsort(-sizes, kind="stable").tolist()
    return [(classes[label], sizes[label].item()) for label in order]


def _spread(by_size: list[tuple[str, Any]], sizes: Array) -> dict[str, Any]:
    return {
        "min": by_size[-1][1],
        "median": float(np.median(sizes)),
        "max": by_size[0][1],
    }


def _extremes(by_size: list[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the five largest classes, and up to five of the others, the smallest first."""
    return {
        "largest_classes": dict(by_size[:5]),
        "smallest_classes": dict(by_size[:4:-1][:5]),
    }


def _read_labels(shards: ShardSet, shard: int, row: int) -> Array | None:
    """Returns a sample's map as it is stored, [height, width]; None for a damaged one."""
    try:
        return images.decode_map(shards.read_annotation(shard, row))
    except (CorruptSampleError, BadImageError):
        return None


def _read_objects(shards: ShardSet, shard: int, row: int) -> Annotated | None:
    """Returns a sample's objects; None for a damaged annotation."""
    try:
        return object_annotations.decode(shards.read_annotation(shard, row), len(shards.classes))
    except (CorruptSampleError, BadObjectsError):
        return None


def _read_picture(shards: ShardSet, shard: int, row: int) -> Image.Image | None:
    """Returns a sample's image; None for a damaged one."""
    try:
        return images.decode(shards.read(shard, row))
    except (CorruptSampleError, BadImageError):
        return None


def _percentiles(values: Array) -> dict[str, int]:
    nearest = np.percentile(values, PERCENTILES, method="nearest")
    percentiles = {}
    for percent, value in zip(PERCENTILES, nearest, strict=True):
        percentiles[f"p{percent}"] = int(value)
    return percentiles


def format_summary(summary: dict[str, Any]) -> str:
    """Returns the summary as a text of a few lines."""
    annotations = summary.get("annotations")
    if annotations == "semantic":
        balance = _format_pixels(summary)
    elif annotations == "objects":
        balance = _format_objects(summary)
    elif annotations == "unlabelled":
        balance = ["no labels"]
    else:
        balance = _format_samples(summary)
    titles = [f"{title:>9}" for title in _PERCENTILE_TITLES]
    lines = [
        _HEADING.format(megabytes=summary["bytes"] / 1e6, **summary),
        "",
        *balance,
        "",
        " " * 12 + "".join(titles),
    ]
    rows = {
        "short side": "short_side_px",
        "long side": "long_side_px",
        "bytes": "image_bytes",
    }
    for title, name in rows.items():
        cells = [f"{value:9,}" for value in summary[name].values()]
        lines.append(f"{title:12}" + "".join(cells))
    return "\n".join(lines)


def _format_samples(summary: dict[str, Any]) -> list[str]:
    spread = summary["samples_per_class"]
    return [
        "samples per class   min {min:,}   median {median:,g}   max {max:,}".format(**spread),
        *_format_extremes(summary, ","),
    ]


def _format_pixels(summary: dict[str, Any]) -> list[str]:
    spread = summary["pixel_share_per_class"]
    return [
        "{labelled_share:.1%} of the pixels of {maps_read:,} maps have a class; of these".format(**summary),
        "pixels per class   min {min:.3%}   median {median:.3%}   max {max:.3%}".format(**spread),
        *_format_extremes(summary, ".3%"),
    ]


def _format_objects(summary: dict[str, Any]) -> list[str]:
    per_image = summary["objects_per_image"]
    num_objects = max(summary["objects"], 1)
    sizes = []
    for name, count in summary["objects_by_size"].items():
        sizes.append(f"{name} {count:,} ({count / num_objects:.0%})")
    return [
        _OBJECTS.format(**summary),
        "objects an image   min {min:,}   mean {mean:.1f}   max {max:,}".format(**per_image),
        "by COCO's sizes    " + "   ".join(sizes),
        *_format_extremes(summary, ","),
    ]


def _format_extremes(summary: dict[str, Any], form: str) -> list[str]:
    lines = []
    for title in ("largest", "smallest"):
        heading = title
        for name, size in summary[f"{title}_classes"].items():
            lines.append(f"  {heading:10}{size:9{form}}  {printable(name)}")
            heading = ""
    return lines


def _draw_sheet(shards: ShardSet, name: str, seed: int) -> Sheet:
    layout = _SHEET_LAYOUTS.get(shards.annotations, _SHEET_LAYOUTS[None])
    chosen = _choose(shards, seed, layout.columns * layout.rows)
    subtitle = f"{len(chosen)} of {len(shards):,} samples at random (seed {seed})"
    sheet = Sheet(
        name,
        f"{subtitle}, {len(shards.classes):,} {layout.classes}",
        columns=layout.columns,
        count=len(chosen),
        num_details=1,
        tile_px=layout.tile_px,
        note=shards.attribution,
    )
    for shard, row in chosen:
        record = shards.index(shard)[row]
        size = f"{record['width']} × {record['height']}"
        picture = _read_picture(shards, shard, row)
        if shards.annotations == "semantic":
            picture, caption = _draw_map(picture, _read_labels(shards, shard, row), shards.classes)
        elif shards.annotations == "objects":
            objects = _read_objects(shards, shard, row)
            picture, caption = _draw_objects(picture, objects, shards.classes, layout.tile_px)
        elif shards.annotations == "unlabelled":
            caption = shards.key(shard, row)
        else:
            caption = shards.classes[record["label"]]
            size = f"class {record['label']} · {size}"
        sheet.add(picture, caption, size)
    return sheet


def _draw_map(
    picture: Image.Image | None,
    labels: Array | None,
    classes: list[str],
) -> Tile:
    """Returns an image with its map below or beside it, and the names of the classes that most of its pixels have."""
    if picture is None or labels is None:
        return None, ""
    counts = np.bincount(labels.ravel(), minlength=256)[1 : len(classes) + 1]
    names = []
    for label in np.argsort(-counts, kind="stable")[:5].tolist():
        if counts[label]:
            names.append(f"{classes[label]} {counts[label] / labels.size:.0%}")
    # The map's value 0 means no label: it wraps around to 255, which is no class and is drawn black.
    colours = colourise(labels - 1, len(classes))
    return _join(picture, colours), ", ".join(names)


def _draw_objects(
    picture: Image.Image | None,
    annotated: Annotated | None,
    classes: list[str],
    side_px: int,
) -> Tile:
    """Returns an image with its boxes and any masks, and how many objects and crowds of which classes it has."""
    if picture is None or annotated is None:
        return None, ""
    counts = Counter((entry["label"], entry["iscrowd"]) for entry in annotated.annotations)
    names = []
    for (label, is_crowd), count in counts.most_common():
        kind = "crowds of " if is_crowd else ""
        names.append(f"{count} {kind}{classes[label]}")
    return draw_annotated(picture, annotated, classes, side_px), ", ".join(names) or "no objects"


def draw_annotated(
    picture: Image.Image,
    annotated: Annotated,
    classes: list[str],
    side_px: int,
) -> Image.Image:
    """Returns a copy of a stored image, its longer side `side_px`, with its objects and crowds, small ones on top."""
    size = annotated.height, annotated.width
    entries = sorted(annotated.annotations, key=lambda entry: entry["area"])
    boxes = [entry["bbox"] for entry in entries]
    labels = [entry["label"] for entry in entries]
    # One mask at a time: at the stored size those of a crowded image may take gigabytes.
    masks = (_mask_or_empty(entry, size) for entry in entries)
    return draw_boxes(
        picture,
        boxes,
        labels,
        scores=None,
        masks=masks,
        classes=classes,
        side_px=side_px,
    )


def _mask_or_empty(entry: dict[str, Any], size: tuple[int, int]) -> Array:
    if "segmentation" in entry:
        return object_annotations.mask(entry, *size)
    return np.zeros(size, np.uint8)


def _join(first: Image.Image, second: Image.Image) -> Image.Image:
    """Returns two pictures of equal size as one, the second to the right of a portrait or below a landscape."""
    x, y = 0, 0
    if first.height > first.width:
        x = first.width
    else:
        y = first.height
    joined = Image.new("RGB", (first.width + x, first.height + y))
    joined.paste(first)
    joined.paste(second, (x, y))
    return joined


def _choose(shards: ShardSet, seed: int, count: int) -> list[tuple[int, int]]:
    """Returns shard and row of up to `count` random samples, sorted by class."""
    generator = keys.generator(keys.key(seed, keys.Stream.SHOW))
    samples = generator.choice(
        len(shards),
        min(len(shards), count),
        replace=False,
    )
    ends = np.cumsum(shards.shard_samples)
    starts = ends - shards.shard_samples
    numbers = np.searchsorted(ends, samples, side="right")
    rows = samples - starts[numbers]
    # A stable sort, so that one seed gives the same sheet everywhere.
    order = np.argsort(shards.records(numbers, rows)["label"], kind="stable")
    return list(zip(numbers[order].tolist(), rows[order].tolist(), strict=True))
