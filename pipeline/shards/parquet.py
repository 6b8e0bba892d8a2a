"""Reads data sets in Parquet files as Hugging Face stores them: encoded images in `image`, classes in `label`.

    files ──label column──▶ labels, class names
    files ──read once, in order──▶ 00000.bin: the images in sorted runs; 00000.npy: position, offset and size of each
    runs  ──positions [a, b)─────▶ the images of a shard

Rows can only be read a row group at a time, while shards need them shuffled. So this is a merge sort on disk. While
packing, it takes the images' size once more on disk, and RUN_BYTES of memory in each worker.
"""

import bisect
import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards.index import encode_records
from pipeline.shards.labels import UNLABELLED_REMEDY, check_first, number_names
from pipeline.shards.manifest import MAX_CLASSES
from pipeline.shards.process_pool import advance

# Commands that read no Parquet files do not import pyarrow.
if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def read_labels(paths: list[Path]) -> tuple[list[list[str | None]], list[str] | None]:
    """Returns the label of every row of every file, None where it has none, and the class list if labels are numbers.

    Numbers are positions in the files' class list, and are returned as names. Without such a list, classes are called
    "0" to the largest number. Raises InputError for files without the columns or with different class lists.
    """
    names: list[str] | None = None
    columns = []
    for path in paths:
        with _open_table(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema, "image", "label")
            names_here = _read_class_names(schema)
            if columns and names_here != names:
                raise InputError(f"{path} and {paths[0]} name different classes: they are of different data sets")
            names = names_here
            table = file.read(["label"])
            columns.append(table.column("label").to_pylist())
    labels = {label for column in columns for label in column}
    labels.discard(None)
    if not all(isinstance(label, int) for label in labels):
        return columns, None
    numbers = {label for label in labels if label >= 0}
    where = str(paths[0].parent)
    if names:
        check_first(numbers, len(names), where)
    else:
        largest = max(numbers, default=0)
        if largest >= MAX_CLASSES:
            raise InputError(f"{where}: label {largest}; class numbers above {MAX_CLASSES} are taken for a mistake")
        names = number_names(numbers, where)
    # Other numbers have no class: -1 is how Hugging Face marks the images of a test split.
    name_of = dict(enumerate(names))
    return [[name_of.get(label) for label in column] for column in columns], names


def count_rows(path: Path) -> int:
    """Returns the number of rows of a file with images. Raises InputError for one without."""
    with _open_table(path) as file:
        _check_columns(path, file.schema_arrow, "image")
        return file.metadata.num_rows


def _check_columns(path: Path, schema: "pa.Schema", *names: str) -> None:
    import pyarrow as pa

    types = dict(zip(schema.names, schema.types, strict=True))
    if not set(names) <= types.keys():
        remedy = f"; {UNLABELLED_REMEDY}" if "label" in names else ""
        raise InputError(
            f"{path}: has the columns {', '.join(types)}; expected {' and '.join(names)}: rename them{remedy}"
        )
    image, label = types["image"], types.get("label")
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise InputError(f"{path}: column image is {image}; expected bytes, or a struct with bytes")
    if "label" not in names:
        return
    if not (pa.types.is_integer(label) or pa.types.is_string(label) or pa.types.is_large_string(label)):
        raise InputError(f"{path}: column label is {label}; expected numbers or class names")


def _read_class_names(schema: "pa.Schema") -> list[str] | None:
    """Returns the names of Hugging Face's ClassLabel from the schema's metadata; None where they are not usable."""
    try:
        tree = json.loads((schema.metadata or {})[b"huggingface"])
        names = tree["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list):
        return None
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        return None
    if len(set(names)) < len(names):
        return None
    return names


def spill(
    path: Path,
    rows: Int64Array,
    positions: Int64Array,
    target: Path,
) -> None:
    """Writes the images of a file's `rows`, [n], to TARGET.bin in runs that are sorted by `positions`, [n].

    TARGET.npy is written last and shows that both are whole. Raises InputError where the file cannot be read.
    """
    places = []
    with target.with_suffix(".bin").open("wb") as out:
        for run in _read_runs(path, rows, positions):
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


def _read_runs(
    path: Path,
    rows: Int64Array,
    positions: Int64Array,
) -> Iterator[list[tuple[int, bytes]]]:
    """Yields the images of `rows` with their positions, about RUN_BYTES at a time."""
    position_of = dict(zip(rows.tolist(), positions.tolist(), strict=True))
    run = []
    run_bytes = 0
    for row, data in enumerate(_read_images(path)):
        if row in position_of:
            run.append((position_of[row], data))
            run_bytes += len(data)
            advance()
        if run_bytes > RUN_BYTES:
            yield run
            run = []
            run_bytes = 0
    yield run


def _read_images(path: Path) -> Iterator[bytes]:
    """Yields the image of every row, in order; no bytes for a row without an image."""
    import pyarrow as pa

    with _open_table(path) as file:
        metadata = file.metadata
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        # An image cannot be larger than its row group, which may be compressed a thousandfold.
        largest = max(sizes, default=0)
        num_rows = 8 * RUN_BYTES // max(1, largest)
        batches = file.iter_batches(
            batch_size=max(1, min(64, num_rows)),
            columns=["image"],
            use_threads=False,
        )
        for batch in batches:
            column = batch.column(0)
            if isinstance(column, pa.StructArray):
                column = column.flatten()[column.type.get_field_index("bytes")]
            for image in column:
                yield image.as_py() or b""


@contextlib.contextmanager
def _open_table(path: Path) -> "Iterator[pq.ParquetFile]":
    """Opens a file to be read in small blocks rather than by row groups, which may be as large as the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            if file.metadata.num_rows > path.stat().st_size:
                raise InputError(f"{path}: {file.metadata.num_rows:,} rows in fewer bytes, so they hold no images")
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}; fetch it again") from error
