"""Decodes every image of data sets once, and measures its pixels.

    shards ──workers: decode──▶ an IMAGE for each image, a histogram of all pixels ──▶ Measurements

Only whole numbers are added up, so nothing depends on the number of workers. 52 bytes of memory an image are kept.
"""

import functools
import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.shards import images
from pipeline.shards.cache import CacheOptions
from pipeline.shards.images import BadImageError
from pipeline.shards.index import CorruptSampleError, Int64Array, ShardSet
from pipeline.shards.open_data import open_data
from pipeline.shards.process_pool import advance, map_tasks

MIN_DEVIATION = 2 / 255
"""The standard deviation of the pixels below which an image counts as constant."""
TINY = 4
"""How many times smaller than the median of its shard a tiny image is."""
EXTREME = 4
"""How many times longer than its short side an image of extreme shape is."""

IMAGE = np.dtype(
    [
        # The number of the data set, and where the image is in it.
        ("set", "<u2"),
        ("shard", "<u4"),
        ("row", "<u4"),
        ("label", "<i4"),
        ("height", "<u2"),
        ("width", "<u2"),
        # The first half of the SHA-256 of size and pixels in RGB; empty for a damaged image.
        ("digest", "S16"),
        ("is_grey", "?"),
        # How suspicious the image is, from 1 on, and why.
        ("rating", "<f4"),
        ("reason", "S13"),
    ]
)


class Measurements(NamedTuple):
    sets: list[ShardSet]
    images: npt.NDArray[np.void]
    """[n] of IMAGE, of all data sets end to end."""
    histograms: Int64Array
    """The number of pixels of each value, [sets, 3, 256], in readable images."""


def measure(roots: list[str], cache: CacheOptions, workers: int) -> Measurements:
    """Measures every image of packed data sets. Raises InputError where one cannot be read."""
    # The files may have been replaced since an earlier call.
    _open_shards.cache_clear()
    sets = [_open_shards(root, cache) for root in roots]
    tasks = []
    for number, shards in enumerate(sets):
        shards.check()
        for shard in range(len(shards.shard_samples)):
            tasks.append((roots[number], cache, number, shard))
    results = map_tasks(
        _measure_shard,
        tasks,
        workers=min(workers, len(tasks)),
        total=sum(map(len, sets)),
        name="measuring",
    )
    tables = []
    histograms = np.zeros((len(sets), 3, 256), np.int64)
    for table, histogram in results:
        tables.append(table)
        histograms[table["set"][0]] += histogram
    return Measurements(sets, np.concatenate(tables), histograms)


# A worker measures many shards of one data set.
@functools.lru_cache(maxsize=8)
def _open_shards(root: str, cache: CacheOptions) -> ShardSet:
    return open_data(root, cache=cache)


def _measure_shard(task: tuple[str, CacheOptions, int, int]) -> tuple[npt.NDArray[np.void], Int64Array]:
    """Returns what is measured of a shard's images, [samples] of IMAGE, and the histogram of their pixels, [3, 256]."""
    root, cache, number, shard = task
    shards = _open_shards(root, cache)
    records = shards.index(shard)
    table = np.zeros(len(records), IMAGE)
    table["set"] = number
    table["shard"] = shard
    table["row"] = np.arange(len(records))
    for name in ("label", "height", "width"):
        table[name] = records[name]
    usual_px = np.median(np.minimum(table["height"], table["width"]))
    total = np.zeros((3, 256), np.int64)
    for row, image in enumerate(table):
        advance()
        try:
            picture = images.decode(shards.read(shard, row))
        except (CorruptSampleError, BadImageError):
            image["rating"] = np.inf
            image["reason"] = "damaged"
            continue
        histogram = np.array(picture.histogram()).reshape(3, 256)
        total += histogram
        _, std = mean_and_std(histogram)
        image["rating"], image["reason"] = _rate(picture.size, std.max(), usual_px)
        pixels = np.asarray(picture)
        image["is_grey"] = (pixels == pixels[..., :1]).all()
        digest = hashlib.sha256(repr(picture.size).encode())
        digest.update(pixels.data)
        image["digest"] = digest.digest()[:16]
    return table, total


def _rate(size: tuple[int, int], deviation: float, usual_px: float) -> tuple[float, str]:
    """Returns how suspicious an image is, above 1 if it is, and the main reason."""
    short = min(size)
    ratings = {
        "constant": MIN_DEVIATION / max(deviation, 1e-6),
        "tiny": usual_px / (TINY * short),
        "extreme shape": max(size) / (EXTREME * short),
    }
    reason = max(ratings, key=ratings.__getitem__)
    return ratings[reason], reason


def mean_and_std(histogram: Int64Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns mean and standard deviation, [3] each on a scale of 0 to 1, of the pixels in a histogram, [3, 256]."""
    values = np.linspace(0, 1, 256)
    num_pixels = np.maximum(1, histogram.sum(axis=1))
    mean = histogram @ values / num_pixels
    variance = histogram @ values**2 / num_pixels - mean**2
    # Rounding may make that of equal pixels negative.
    return mean, np.sqrt(np.maximum(0, variance))


def find_repeats(digests: npt.NDArray[np.bytes_]) -> Int64Array:
    """Returns pairs, [n, 2], of positions: for each digest that an earlier one equals, the first such one and its own.

    Digests that are empty equal none.
    """
    _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
    originals = firsts[groups]
    is_repeat = (originals != np.arange(len(digests))) & (digests != b"")
    return np.stack([originals[is_repeat], np.flatnonzero(is_repeat)], axis=1)
