"""What a data set holds, for a person: counts, balance, sizes, and a sheet of random samples.

    indices ──▶ counts and percentiles ──▶ summary ──▶ text
    some random samples ──▶ contact sheet

Sizes are read from the indices, so only the pictures of the sheet are opened.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.shards import images
from pipeline.shards.images import BadImageError
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.shards.store import Cache
from pipeline.sheet import Sheet

COLUMNS, ROWS = 8, 5
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)

_CACHE_BYTES = 64 << 20  # for the indices of a remote data set; of its shards only some samples are wanted


def show(root: str | Path, sheet: Path, seed: int = 0) -> dict[str, Any]:
    """Summarise the data set at `root` and draw a contact sheet of random samples into the PNG file `sheet`.

    Raises InputError where the data set cannot be read or the sheet not written.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(root, cache=Cache(folder, _CACHE_BYTES))
        summary = _summary(shards)
        picture = _draw_sheet(shards, Path(root).absolute().name, seed)
        shards.close()
    picture.save(sheet)
    return {"data": str(root), **summary, "sheet": str(sheet)}


def _summary(shards: ShardSet) -> dict[str, Any]:
    counts = np.zeros(len(shards.classes), np.int64)
    sizes = np.empty((3, len(shards)), np.uint32)  # short side, long side, bytes
    start = 0
    for number, samples in enumerate(shards.shard_samples.tolist()):
        records = shards.index(number)
        counts += np.bincount(records["label"], minlength=len(counts))
        sides = records["height"], records["width"]
        sizes[:, start : start + samples] = np.minimum(*sides), np.maximum(*sides), records["size"]
        start += samples
    by_count = np.argsort(-counts, kind="stable").tolist()
    named = [(shards.classes[label], int(counts[label])) for label in by_count]
    return {
        "samples": len(shards),
        "shards": len(shards.shard_samples),
        "classes": len(shards.classes),
        "bytes": int(sizes[2].sum(dtype=np.int64)),
        "digest": shards.digest,
        "samples_per_class": {"min": named[-1][1], "median": float(np.median(counts)), "max": named[0][1]},
        "largest_classes": dict(named[:5]),
        "smallest_classes": dict(named[::-1][:5]),
        "short_side_px": _percentiles(sizes[0]),
        "long_side_px": _percentiles(sizes[1]),
        "image_bytes": _percentiles(sizes[2]),
    }


def _percentiles(values: npt.NDArray[np.uint32]) -> dict[str, int]:
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def table(summary: dict[str, Any]) -> str:
    """The summary as text of a few lines."""
    balance = summary["samples_per_class"]
    lines = [
        f"{summary['data']}: {summary['samples']:,} samples of {summary['classes']:,} classes "
        f"in {summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB of images",
        "",
        f"samples per class   min {balance['min']:,}   median {balance['median']:,g}   max {balance['max']:,}",
        *_class_lines("largest", summary["largest_classes"]),
        *_class_lines("smallest", summary["smallest_classes"]),
        "",
        " " * 12 + "".join(f"{'min' if p == 0 else 'max' if p == 100 else f'{p} %':>9}" for p in PERCENTILES),
    ]
    for title, name in (("short side", "short_side_px"), ("long side", "long_side_px"), ("bytes", "image_bytes")):
        lines.append(f"{title:12}" + "".join(f"{value:9,}" for value in summary[name].values()))
    return "\n".join(lines)


def _class_lines(title: str, classes: dict[str, int]) -> list[str]:
    return [f"  {title if row == 0 else '':10}{count:9,}  {name}" for row, (name, count) in enumerate(classes.items())]


def _draw_sheet(shards: ShardSet, name: str, seed: int) -> Sheet:
    chosen = _choose(shards, seed)
    about = f"{len(chosen)} of {len(shards):,} samples at random (seed {seed}), {len(shards.classes):,} classes"
    sheet = Sheet(name, about, columns=COLUMNS, count=len(chosen), num_details=1)
    for shard, row in chosen:
        record = shards.index(shard)[row]
        try:
            picture = images.decode(shards.read(shard, row))
        except (CorruptSampleError, BadImageError):
            picture = None
        size = f"class {record['label']} · {record['width']} × {record['height']}"
        sheet.add(picture, shards.classes[record["label"]], size)
    return sheet


def _choose(shards: ShardSet, seed: int) -> list[tuple[int, int]]:
    """Shard and row of random samples, those of a class side by side."""
    generator = keys.generator(keys.key(seed, keys.Stream.SHOW))
    samples = generator.choice(len(shards), min(len(shards), COLUMNS * ROWS), replace=False)
    ends = np.cumsum(shards.shard_samples)
    numbers = np.searchsorted(ends, samples, side="right")
    rows = samples - (ends - shards.shard_samples)[numbers]
    order = np.argsort(shards.records(numbers, rows)["label"], kind="stable")
    return list(zip(numbers[order].tolist(), rows[order].tolist(), strict=True))
