"""Images in Parquet files, as Hugging Face keeps data sets: encoded images in a column `image`, classes in `label`.

    files ──label column──▶ labels, class names
    files ──read once, in order──▶ 00000.bin: the images in sorted runs; 00000.npy: position and place of each
    runs  ──positions [a, b)─────▶ the images of a shard

Rows can only be read a row group at a time, while shards want them shuffled. So this is a merge sort on disk: it takes
the images' size once more there while packing, and RUN_BYTES of memory in each worker.
"""

import bisect
import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards.index import MAX_CLASSES
from pipeline.shards.labels import check_first, numbered
from pipeline.shards.process_pool import advance

if TYPE_CHECKING:  # which commands without Parquet files do without
    import pyarrow as pa
    import pyarrow.parquet as pq

RUN_BYTES = 128 << 20

PLACE = np.dtype([("position", "<i8"), ("offset", "<u8"), ("size", "<u8")])


def read_labels(paths: list[Path]) -> tuple[list[list[str | None]], list[str] | None]:
    """The label of every row of every file, None where it has none, and the class list where the files have one.

    Numbers are positions in that list; files without it give numbers as text, and the list is "0" to the largest.
    Raises InputError for files that are no such data set.
    """
    names: list[str] | None = None
    columns = []
    for path in paths:
        with _opened(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema)
            found = _class_names(schema)
            if columns and found != names:
                raise InputError(f"{path} and {paths[0]} name different classes: they are of different data sets")
            names = found
            columns.append(file.read(["label"]).column("label").to_pylist())
    if all(label is None or isinstance(label, int) for column in columns for label in column):
        numbers = {label for column in columns for label in column if label is not None and label >= 0}
        where = str(paths[0].parent)
        if names:
            check_first(numbers, len(names), where)
        elif (top := max(numbers, default=0)) >= MAX_CLASSES:
            raise InputError(f"{where}: label {top}; class numbers above {MAX_CLASSES} are taken for a mistake")
        names = names or numbered(numbers, where)
        return [[_name(names, label) for label in column] for column in columns], names
    return columns, None


def _check_columns(path: Path, schema: "pa.Schema") -> None:
    import pyarrow as pa

    types = dict(zip(schema.names, schema.types, strict=True))
    if not {"image", "label"} <= types.keys():
        raise InputError(f"{path}: has the columns {', '.join(types)}; expected image and label: rename them")
    image, label = types["image"], types["label"]
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise InputError(f"{path}: column image is {image}; expected bytes, or a struct with bytes")
    if not (pa.types.is_integer(label) or pa.types.is_string(label) or pa.types.is_large_string(label)):
        raise InputError(f"{path}: column label is {label}; expected numbers or class names")


def _class_names(schema: "pa.Schema") -> list[str] | None:
    """Of Hugging Face's ClassLabel, which the schema's metadata describes."""
    try:
        tree = json.loads((schema.metadata or {})[b"huggingface"])
        names = tree["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return names if is_list and len(set(names)) == len(names) else None


def _name(names: list[str], label: int | None) -> str | None:
    # -1 is how Hugging Face marks the images of a test split.
    return names[label] if label is not None and 0 <= label < len(names) else None


def spill(path: Path, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], target: Path) -> None:
    """Write the images of a file's `rows`, [n], to TARGET.bin so that those of near `positions`, [n], lie together.

    TARGET.npy is written last and says that both are whole. Raises InputError where the file cannot be read.
    """
    places = []
    with target.with_suffix(".bin").open("wb") as out:
        for run in _runs(path, rows, positions):
            run.sort()
            for position, data in run:
                places.append((position, out.tell(), len(data)))
                out.write(data)
            run.clear()  # before the next one is read
        out.flush()
        os.fsync(out.fileno())
    buffer = io.BytesIO()
    np.save(buffer, np.sort(np.array(places, PLACE), order="position"), allow_pickle=False)
    files.write(target.with_suffix(".npy"), buffer.getvalue())


def is_spilled(target: Path) -> bool:
    """Whether `spill` has been here and its files are whole."""
    try:
        places = np.load(target.with_suffix(".npy"), allow_pickle=False)
        return target.with_suffix(".bin").stat().st_size == places["size"].sum()
    except (OSError, ValueError):
        return False


def read_spilled(targets: Iterable[Path], first: int, last: int) -> Iterator[bytes]:
    """The images at positions first, …, last - 1, one at a time: a shard of them may be larger than memory."""
    found: list[tuple[Path, int, int] | None] = [None] * (last - first)
    for target in targets:
        places = np.load(target.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        begin, end = (bisect.bisect_left(places["position"], position) for position in (first, last))
        for position, offset, size in places[begin:end].tolist():
            found[position - first] = target.with_suffix(".bin"), offset, size
    for place in found:
        yield _read_part(*place) if place else b""


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _runs(
    path: Path, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> Iterator[list[tuple[int, bytes]]]:
    """The images of `rows` with their positions, some RUN_BYTES at a time."""
    position_of = dict(zip(rows.tolist(), positions.tolist(), strict=True))
    run, run_bytes = [], 0
    for row, data in enumerate(_images(path)):
        if row in position_of:
            run.append((position_of[row], data))
            run_bytes += len(data)
            advance()
        if run_bytes > RUN_BYTES:
            yield run
            run, run_bytes = [], 0
    yield run


def _images(path: Path) -> Iterator[bytes]:
    """Of every row, in order; of a row without an image, no bytes."""
    import pyarrow as pa

    with _opened(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        # No image has more than all of its row group, which may be compressed a thousandfold.
        most_bytes = max((group.total_byte_size for group in groups), default=0)
        num_rows = max(1, min(64, 8 * RUN_BYTES // max(1, most_bytes)))
        for batch in file.iter_batches(batch_size=num_rows, columns=["image"], use_threads=False):
            column = batch.column(0)
            if isinstance(column, pa.StructArray):
                column = column.flatten()[column.type.get_field_index("bytes")]
            for image in column:
                yield image.as_py() or b""


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[pq.ParquetFile]":
    """Read in small blocks rather than by row groups, which may be as large as the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            if file.metadata.num_rows > path.stat().st_size:
                raise InputError(f"{path}: {file.metadata.num_rows:,} rows in fewer bytes, so they hold no images")
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}; fetch it again") from error
