"""Writes tables of answers and of features: CSV, JSON lines or Parquet by the suffix of the file's name.

Lists are JSON in a CSV file. An image that cannot be used has a row of its path and "error" alone.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.predict.work_folder import Row

_ROWS_AT_ONCE = 1000
_TYPES = {
    "score": pa.float64(),
    "labels": pa.list_(pa.string()),
    "scores": pa.list_(pa.float64()),
    "values": pa.list_(pa.int64()),
    "shares": pa.list_(pa.float64()),
    "boxes": pa.list_(pa.list_(pa.float64())),
    "segmentations": pa.list_(pa.struct({"size": pa.list_(pa.int64()), "counts": pa.string()})),
}
"""The types of columns that are no text."""


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Writes the columns of rows."""
    if path.suffix == ".parquet":
        _write_parquet(path, rows, columns)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(columns)
            for row in rows:
                cells = [_as_cell(row.get(column)) for column in columns]
                table.writerow(cells)
    else:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                kept = {column: row[column] for column in columns if column in row}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _as_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _write_parquet(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    fields = []
    for column in columns:
        kind = _TYPES.get(column, pa.string())
        fields.append((column, kind))
    schema = pa.schema(fields)
    rows = iter(rows)
    with pq.ParquetWriter(path, schema) as table:
        while group := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            part = pa.Table.from_pylist(group, schema)
            table.write_table(part)


def write_features(path: Path, features: np.ndarray, names: Iterator[str]) -> None:
    """Writes features [n, …], as .npy, or as Parquet: a path and the flat list of its values in each row."""
    if path.suffix == ".npy":
        with path.open("wb") as file:
            np.save(file, features)
        return
    flat = features.reshape(len(features), -1)
    width = flat.shape[1]
    fields = [
        ("path", pa.string()),
        ("features", pa.list_(pa.float32(), width)),
    ]
    metadata = {"shape": json.dumps(features.shape[1:])}
    schema = pa.schema(fields, metadata)
    with pq.ParquetWriter(path, schema) as table:
        for first in range(0, len(flat), _ROWS_AT_ONCE):
            group = flat[first : first + _ROWS_AT_ONCE]
            lists = pa.FixedSizeListArray.from_arrays(
                pa.array(group.ravel()),
                width,
            )
            paths = pa.array(
                itertools.islice(names, _ROWS_AT_ONCE),
                pa.string(),
            )
            part = pa.Table.from_arrays([paths, lists], schema=schema)
            table.write_table(part)
