"""Sorts the images of files that can only be read in order near the order of the shards: a merge sort on disk.

    container ──read once──▶ 00000.bin: the images in sorted runs; 00000.npy: position, offset and size of each
    runs ──positions [a, b)──▶ the images of a shard

Rows of a Parquet file and members of a foreign tar come one after the other, while shards need them shuffled. While
packing, this takes the images' size once more on disk, and RUN_BYTES of memory in each worker.
"""

import bisect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.shards.index import encode_records
from pipeline.shards.process_pool import advance

Int64Array = npt.NDArray[np.int64]

RUN_BYTES = 128 << 20

PLACE = np.dtype(
    [
        # The image's position in the shuffled order.
        ("position", "<i8"),
        # Where it lies in the .bin file, in bytes.
        ("offset", "<u8"),
        ("size", "<u8"),
    ]
)


class Source(Protocol):
    """A file whose images can only be read in order: parquet.Table, foreign_tars.Tar."""

    @property
    def place(self) -> str:
        """The path or URL of the file, as messages name it."""
        ...

    def read_images(self, rows: Int64Array) -> Iterator[tuple[int, bytes]]:
        """Yields each of `rows`, [n] in rising order, once, with its image; no bytes for a row without an image.

        Raises InputError where the file cannot be read.
        """
        ...


class Container(NamedTuple):
    """The images of a file that are entries of a listing."""

    source: Source
    rows: Int64Array
    """The row of each entry, [n], in rising order. Links make several entries of one row."""


def spill(container: Container, positions: Int64Array, target: Path) -> None:
    """Writes the images of a container to TARGET.bin in runs that are sorted by their `positions`, [n].

    TARGET.npy is written last and shows that both are whole. Raises InputError where the container cannot be read.
    """
    places = []
    with target.with_suffix(".bin").open("wb") as out:
        for run in _read_runs(container, positions):
            run.sort()
            for position, data in run:
                places.append((position, out.tell(), len(data)))
                out.write(data)
            # Frees the memory before the next run is read.
            run.clear()
        out.flush()
        os.fsync(out.fileno())
    by_position = np.sort(np.array(places, PLACE), order="position")
    files.write(target.with_suffix(".npy"), encode_records(by_position))


def is_spilled(target: Path) -> bool:
    """Returns whether `spill` has written its files and they are whole."""
    try:
        places = np.load(target.with_suffix(".npy"), allow_pickle=False)
        return target.with_suffix(".bin").stat().st_size == places["size"].sum()
    except (OSError, ValueError):
        return False


def read_spilled(targets: Iterable[Path], first: int, last: int) -> Iterator[bytes]:
    """Yields the images at positions first, …, last - 1, one at a time: a shard of them may be larger than memory."""
    places: list[tuple[Path, int, int] | None] = [None] * (last - first)
    for target in targets:
        table = np.load(target.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        path = target.with_suffix(".bin")
        begin = bisect.bisect_left(table["position"], first)
        end = bisect.bisect_left(table["position"], last)
        for position, offset, size in table[begin:end].tolist():
            places[position - first] = path, offset, size
    for place in places:
        yield _read_slice(*place) if place else b""


def _read_slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_runs(container: Container, positions: Int64Array) -> Iterator[list[tuple[int, bytes]]]:
    """Yields the images with their positions, about RUN_BYTES at a time."""
    run = []
    run_bytes = 0
    for row, data in container.source.read_images(container.rows):
        first, last = np.searchsorted(container.rows, (row, row + 1))
        for position in positions[first:last].tolist():
            run.append((position, data))
            run_bytes += len(data)
            advance()
        if run_bytes > RUN_BYTES:
            yield run
            run = []
            run_bytes = 0
    yield run
