"""Reads data sets in Parquet files as Hugging Face stores them: encoded images in `image`, classes in `label`.

files ──label column──▶ labels, class names
Table ──read once, in order──▶ images, which spill.py sorts
"""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError
from pipeline.shards import spill
from pipeline.shards.labels import UNLABELLED_REMEDY, check_first, number_names
from pipeline.shards.manifest import MAX_CLASSES
from pipeline.shards.part_names import PartNames, Use, describe_parts, separator_behind
from pipeline.shards.spill import Int64Array

# Commands that read no Parquet files do not import pyarrow.
if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE, LABEL = "image", "label"
"""The usual names of the columns."""


class Table(NamedTuple):
    """The images of a file, a spill.Source."""

    path: Path
    image: str
    """The column of the images."""

    @property
    def place(self) -> str:
        return str(self.path)

    def read_images(self, rows: Int64Array) -> Iterator[tuple[int, bytes]]:
        wanted = set(rows.tolist())
        for row, data in enumerate(_read_images(self.path, self.image)):
            if row in wanted:
                yield row, data


def read_labels(
    paths: list[Path],
    image: str = IMAGE,
    label: str = LABEL,
) -> tuple[list[list[str | None]], list[str] | None]:
    """Returns the label of every row of every file, None where it has none, and the class list if labels are numbers.

    Numbers are positions in the files' class list, and are returned as names. Without such a list, classes are called
    "0" to the largest number. Raises InputError for files without the columns `image` and `label`, or with different
    class lists.
    """
    names: list[str] | None = None
    columns = []
    for path in paths:
        with _open_table(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema, image, label)
            names_here = _read_class_names(schema, label)
            if columns and names_here != names:
                raise InputError(f"{path} and {paths[0]} name different classes: they are of different data sets")
            names = names_here
            table = file.read([label])
            columns.append(table.column(label).to_pylist())
    labels = {value for column in columns for value in column}
    labels.discard(None)
    if not all(isinstance(value, int) for value in labels):
        return columns, None
    numbers = {value for value in labels if value >= 0}
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
    return [[name_of.get(value) for value in column] for column in columns], names


def count_rows(path: Path, image: str) -> int:
    """Returns the number of rows of a file with images in the column `image`. Raises InputError for one without."""
    with _open_table(path) as file:
        _check_columns(path, file.schema_arrow, image, None)
        return file.metadata.num_rows


def _check_columns(path: Path, schema: "pa.Schema", image: str, label: str | None) -> None:
    uses: dict[str, Use] = {field.name: _guess_use(field.type) for field in schema}
    expected = [image, label] if label else [image]
    if not set(expected) <= uses.keys():
        command = f"pack --images {shlex.quote(str(path))} --out DIR"
        parts = describe_parts(uses, command, PartNames(image, label))
        remedy = f"{separator_behind(parts)}{UNLABELLED_REMEDY}" if label else ""
        raise InputError(f"{path}: expected the columns {' and '.join(expected)}; {parts}{remedy}")
    if uses[image] != "image":
        type_ = schema.field(image).type
        raise InputError(f"{path}: column {image} is {type_}; expected bytes, or a struct with bytes")
    if label and uses[label] != "label":
        raise InputError(f"{path}: column {label} is {schema.field(label).type}; expected numbers or class names")


def _guess_use(type_: "pa.DataType") -> Use:
    import pyarrow as pa

    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = type_.field("bytes").type
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return "image"
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return "label" if is_text or pa.types.is_integer(type_) else ""


def _read_class_names(schema: "pa.Schema", label: str) -> list[str] | None:
    """Returns the names of Hugging Face's ClassLabel from the schema's metadata; None where they are not usable."""
    try:
        tree = json.loads((schema.metadata or {})[b"huggingface"])
        names = tree["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list):
        return None
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        return None
    if len(set(names)) < len(names):
        return None
    return names


def _read_images(path: Path, column_name: str) -> Iterator[bytes]:
    """Yields the image of every row, in order; no bytes for a row without an image."""
    import pyarrow as pa

    with _open_table(path) as file:
        metadata = file.metadata
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        # An image cannot be larger than its row group, which may be compressed a thousandfold.
        largest = max(sizes, default=0)
        num_rows = 8 * spill.RUN_BYTES // max(1, largest)
        batches = file.iter_batches(
            batch_size=max(1, min(64, num_rows)),
            columns=[column_name],
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
