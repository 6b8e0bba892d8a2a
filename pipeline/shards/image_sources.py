"""What to pack: every image with its key and class.

    DIR/CLASS/**/NAME.jpg                 ┐
    LIST.csv, LIST.jsonl: path, label     ├──▶ Listing: classes, entries sorted by key, digest
    FILE.parquet, DIR/*.parquet           │
    annotations and images: ade20k.py,    ┘
                            coco.py

Images are not opened here, only listed, so that a mistake is told before hours of work. An image takes some 400 bytes
of memory.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards import parquet
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import entries_of, files_below, is_folder, is_system, report_ignored
from pipeline.shards.index import Annotations
from pipeline.shards.labels import are_several, check_first, is_number

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Files that are taken for images in a tree."""

MAX_LINE_LENGTH = 1 << 20
"""Of a list, in characters."""

_NO_IMAGES = (
    "no images; a class folder holds at least one file that ends in "
    f"{', '.join(f'.{extension}' for extension in EXTENSIONS)}"
)
_SPLIT = re.compile(r"(train|training|trainval|val|valid|validation|dev|eval|evaluation|test|testing)[-_]?\d*", re.I)


class ImageEntry(NamedTuple):
    """One image to pack."""

    key: str
    place: str
    """Path of its file; of a Parquet row, file and row for messages."""
    label: int
    annotation: str | bytes | None = None
    """What is packed with the image in place of its label: the path of its map, or its objects."""


@dataclasses.dataclass(frozen=True)
class ImageListing:
    classes: list[str]
    entries: list[ImageEntry]
    digest: str
    """Of the entries and of their files' sizes and times."""
    bad: list[BadSource]
    """Files that are not there, rows without a class, images and annotations without each other."""
    tables: list["Table"] = dataclasses.field(default_factory=list)
    """Parquet files that the entries are rows of."""
    annotations: Annotations | None = None
    """What kind they are of, where each entry has one."""


class Table(NamedTuple):
    path: Path
    rows: npt.NDArray[np.int64]
    """[n] rows of the file that are entries, one after the other."""


def find(images: str | Path, classes: list[str] | None = None) -> ImageListing:
    """List the images of a tree, list or Parquet data set. `classes` fixes the class list.

    Raises InputError for what cannot be listed, for a class that is not in `classes`, and for two images of one key.
    """
    path = Path(images)
    if any(character in str(images) for character in "*?[") and not path.exists():
        matching = glob.glob(str(images), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        return _from_tables(sorted(map(Path, matching)), images, classes)
    if path.is_dir():
        tables = sorted(table for table in path.glob("*.parquet") if not is_system(table.name))
        return _from_tables(tables, images, classes) if tables else _from_tree(path, classes)
    if not path.is_file():
        raise InputError(f"{images}: no such file or folder")
    if path.suffix == ".parquet":
        return _from_tables([path], images, classes)
    if path.suffix in (".csv", ".jsonl"):
        return _from_list(path, classes)
    raise InputError(f"{images}: expected a folder, a .csv or .jsonl list, or a .parquet file")


def _from_tree(images: Path, classes: list[str] | None) -> ImageListing:
    ignored: list[str] = []
    top = entries_of(str(images), ignored)
    folders = [entry.name for entry in top if is_folder(entry)]
    left_out = [entry.path for entry in top if not is_folder(entry)]
    if not folders:
        raise InputError(f"{images}: no class folders; expected {images}/CLASS/IMAGE.jpg")
    if unreadable := [name for name in folders if not name.isprintable()]:
        # Undecodable bytes of a file name show as lone surrogates.
        names = ", ".join(map(repr, unreadable))
        raise InputError(f"{str(images)!r}: a class name is readable text in UTF-8: rename the folders {names}")
    if not set(folders) <= set(classes or ()):
        _refuse_splits(images, folders)
    pictures: dict[str, list[str]] = {name: [] for name in folders}
    for name in folders:
        for path in files_below(str(images / name), ignored):
            is_image = path.rpartition(".")[2].lower() in EXTENSIONS
            (pictures[name] if is_image else left_out).append(path)
    report_ignored(ignored)
    if left_out:
        print(f"left out {len(left_out)} files that are no class's images: {left_out[0]} …", file=sys.stderr)
    empty = [BadSource(str(images / name), name, _NO_IMAGES) for name in folders if not pictures[name]]
    if classes is None:
        classes = [name for name in folders if pictures[name]]
    elif unknown := sorted(set(folders) - set(classes)):
        raise InputError(
            f"{images}: class folders {unknown} are not among the {len(classes)} classes of --classes-from; "
            "rename them or pack the split that has them first"
        )
    labels = {name: label for label, name in enumerate(classes)}
    found = [
        ImageEntry(key_of(name + path.removeprefix(str(images / name))), path, labels[name])
        for name in folders
        for path in pictures[name]
    ]
    return listing(classes, found, empty)


def _refuse_splits(images: Path, folders: list[str]) -> None:
    """Raises InputError for a folder of splits, each with its class folders, which would become the classes."""
    if not all(map(_SPLIT.fullmatch, folders)):
        return
    splits = [name for name in folders if any(map(is_folder, entries_of(str(images / name), [])))]
    if not splits:
        return
    splits.sort(key=lambda name: not name.lower().startswith("train"))
    command = "  python launch/shards.py pack --images {} --out data/{}"
    lines = [command.format(shlex.quote(str(images / name)), name) for name in splits]
    lines[1:] = [f"{line} --classes-from data/{splits[0]}" for line in lines[1:]]
    flat = [name for name in folders if name not in splits]
    without = f"; {', '.join(flat)} without class folders need a .csv list of path and label" if flat else ""
    raise InputError(
        f"{images}: its folders {', '.join(folders)} are splits, not classes: pack each by itself{without}; "
        "if they are classes, list the images in a .csv\n" + "\n".join(lines)
    )


class _Row(NamedTuple):
    line: int
    path: str
    label: str


def _read_list(path: Path) -> list[_Row]:
    """The rows of a CSV file with a header, or of JSON lines."""
    try:
        with os.fdopen(files.open_regular(path), newline="", encoding="utf-8-sig") as file:
            lines = iter(lambda: _line(file), "")
            table = _csv_rows(path, lines) if path.suffix == ".csv" else _json_rows(lines)
            rows = [_checked_row(path, *row) for row in table]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a {path.suffix} list in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{path}: lists no images")
    return rows


def _line(file: TextIO) -> str:
    line = file.readline(MAX_LINE_LENGTH)
    if len(line) == MAX_LINE_LENGTH:
        raise ValueError(f"a line of more than {MAX_LINE_LENGTH:,} characters")
    return line


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Any, Any]]:
    table = csv.DictReader(lines)
    if not {"path", "label"} <= set(table.fieldnames or ()):
        found = ", ".join(table.fieldnames or ())
        raise InputError(f"{path}: the first line names the columns, path and label among them; found {found}")
    for row in table:
        yield table.line_num, row["path"], row["label"]


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = json.loads(line)
            row = row if isinstance(row, dict) else {}
            yield number, row.get("path"), row.get("label")


def _checked_row(path: Path, line: int, where: Any, label: Any) -> _Row:
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(where, str) or not where or "\0" in where:
        raise InputError(f"{path}, line {line}: path {where!r}; expected the path of an image")
    if not isinstance(label, str) or not label.strip().isprintable() or not label.strip():
        raise InputError(f"{path}, line {line}: label {label!r}; expected a class name or number")
    if are_several(label.strip()):
        raise InputError(f"{path}, line {line}: label {label!r} is several numbers; an image has one class")
    return _Row(line, where, label.strip())


def _from_list(path: Path, classes: list[str] | None) -> ImageListing:
    rows = _read_list(path)
    classes, positions = number_classes({row.label for row in rows}, classes, str(path))
    folder = path.parent.absolute()
    places = [os.path.normpath(folder / row.path) for row in rows]
    shared = os.path.commonpath({Path(place).parent for place in places})
    entries = [
        ImageEntry(key_of(os.path.relpath(place, shared)), place, positions[row.label])
        for place, row in zip(places, rows, strict=True)
    ]
    return listing(classes, entries)


def number_classes(labels: set[str], classes: list[str] | None, where: str) -> tuple[list[str], dict[str, int]]:
    """The class list, sorted, numbers by their value, and the position of each label in it.

    `classes` fixes the list. Then a label is one of its names, or a position in it where all labels are numbers and no
    name is. Raises InputError for a label that is neither.
    """
    are_numbers = all(map(is_number, labels))
    if classes is None:
        classes = sorted(labels, key=lambda label: (int(label), label)) if are_numbers else sorted(labels)
    positions = {name: number for number, name in enumerate(classes)}
    if are_numbers and not any(map(is_number, classes)):
        check_first({int(label) for label in labels}, len(classes), where)
        positions = {label: int(label) for label in labels if int(label) < len(classes)}
    if unknown := sorted(labels - positions.keys()):
        more = " …" if len(unknown) > 5 else ""
        raise InputError(
            f"{where}: labels {', '.join(map(repr, unknown[:5]))}{more} are not among the {len(classes)} classes of "
            "--classes-from; rename them or pack the split that has them first"
        )
    return classes, positions


def _from_tables(paths: list[Path], images: str | Path, classes: list[str] | None) -> ImageListing:
    if not paths:
        raise InputError(f"{images}: no such file or folder")
    splits = sorted({match[1] for path in paths if (match := re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", path.name))})
    if len(splits) > 1:
        raise InputError(
            f"{images}: holds the splits {', '.join(splits)}; "
            f"name the files of one: --images '{paths[0].parent}/{splits[0]}-*.parquet'"
        )
    labels, names = parquet.read_labels(paths)
    found = {label for column in labels for label in column if label is not None}
    classes, positions = number_classes(found, classes or names, str(images))
    shared = os.path.commonpath({path.parent for path in paths})
    entries, bad, tables = [], [], []
    for path, column in zip(paths, labels, strict=True):
        folder = key_of(os.path.relpath(path, shared))
        rows = [row for row, label in enumerate(column) if label is not None]
        entries += [ImageEntry(f"{folder}/{row:08d}", f"{path} row {row}", positions[str(column[row])]) for row in rows]
        bad += [
            BadSource(f"{path} row {row}", f"{folder}/{row:08d}", "has no class")
            for row, label in enumerate(column)
            if label is None
        ]
        tables.append(Table(path, np.array(rows, np.int64)))
    digest = _digest(classes, [(str(path), path.stat()) for path in paths], entries)
    return ImageListing(classes, entries, digest, bad, tables)


def listing(
    classes: list[str], entries: list[ImageEntry], bad: Sequence[BadSource] = (), annotations: Annotations | None = None
) -> ImageListing:
    """Of images in files of their own: sorted by key. Those that are not there, and all but the first of one key, are
    bad."""
    unique: list[ImageEntry] = []
    twins: list[BadSource] = []
    for entry in sorted(entries):
        if unique and unique[-1].key == entry.key:
            both = f"it and {unique[-1].place} would both be {entry.key!r} in the shards: rename or remove one of them"
            twins.append(BadSource(entry.place, entry.key, both))
        else:
            unique.append(entry)
    there, missing, stats = [], [], []
    for entry in unique:
        try:
            for place in (entry.place, entry.annotation):
                if isinstance(place, str):
                    stats.append((place, Path(place).stat()))
            there.append(entry)
        except OSError as error:
            missing.append(BadSource(str(error.filename), entry.key, f"cannot be read: {error.strerror}"))
    return ImageListing(
        classes, there, _digest(classes, stats, there), [*bad, *twins, *missing], annotations=annotations
    )


def _digest(classes: list[str], stats: Iterable[tuple[str, os.stat_result]], entries: list[ImageEntry]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for path, stat in stats:
        digest.update(repr((path, stat.st_size, stat.st_mtime_ns)).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def key_of(path: str) -> str:
    """The key of a file by its path below the data set's folder."""
    # WebDataset ends a sample's key at the first dot of its name.
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}".replace(".", "_")
