"""Lists what to pack: every image with its key and class.

    DIR/CLASS/**/NAME.jpg                 ┐
    LIST.csv, LIST.jsonl: path, label     ├──▶ ImageListing: classes, entries sorted by key, digest
    FILE.parquet, DIR/*.parquet           │
    annotations and images: ade20k.py,    ┘
                            coco.py

Images are only listed here and not opened, so that a mistake is reported before hours of work. The listing takes some
400 bytes of memory an image.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards import parquet
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import entries_of, files_below, is_folder, is_system, refuse_flat, report_ignored
from pipeline.shards.labels import UNLABELLED_REMEDY, are_several, check_first, is_number
from pipeline.shards.manifest import Annotations
from pipeline.value_text import list_first

log = logging.getLogger(__name__)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""The extensions of files that are images in class folders."""

MAX_LINE_LENGTH = 1 << 20
"""The limit for a line of a list, in characters."""

_NO_IMAGES = (
    "no images; a class folder holds at least one file that ends in "
    f"{', '.join(f'.{extension}' for extension in EXTENSIONS)}"
)
VALIDATION_NAMES = "val|valid|validation|dev|eval|evaluation"
_SPLIT_NAMES = f"train|training|trainval|{VALIDATION_NAMES}|test|testing"
SPLIT = re.compile(rf"({_SPLIT_NAMES})[-_]?\d*", re.IGNORECASE)
_TABLE_OF_SPLIT = re.compile(r"(.+)-\d+-of-\d+\.parquet")


class ImageEntry(NamedTuple):
    """One image to pack. The names of its fields are part of the listing's digest, so they stay as they are."""

    key: str
    place: str
    """The path of the image's file; for a row of a Parquet file, file and row as messages name them."""
    label: int
    annotation: str | bytes | None = None
    """What is packed with the image in place of its label: the path of its map, or its encoded objects."""


@dataclasses.dataclass(frozen=True)
class ImageListing:
    classes: list[str]
    entries: list[ImageEntry]
    digest: str
    """The digest of the entries and of their files' sizes and times."""
    bad: list[BadSource]
    """Missing files, rows without a class, images without an annotation, and annotations without an image."""
    tables: list["Table"] = dataclasses.field(default_factory=list)
    """The Parquet files that the entries are rows of."""
    annotations: Annotations | None = None
    """The kind of the entries' annotations; None where entries have labels."""


class Table(NamedTuple):
    path: Path
    rows: npt.NDArray[np.int64]
    """The rows of the file that are entries, [n], in rising order."""


def find(images: str | Path, classes: list[str] | None = None) -> ImageListing:
    """Lists the images of class folders, of a list or of Parquet files. `classes` fixes the class list.

    Raises InputError for what cannot be listed, and for a class that is not in `classes`.
    """
    if tables := find_tables(images):
        return _list_tables(tables, images, classes)
    path = Path(images)
    if path.is_dir():
        return _list_class_folders(path, classes)
    return _list_rows(require_list(path), classes)


def find_tables(images: str | Path) -> list[Path]:
    """Returns the Parquet files that a path, a folder of them or a pattern names; none for other sources."""
    path = Path(images)
    # A folder may have such a character in its name.
    if is_pattern(images) and not path.exists():
        # Path.glob takes no absolute pattern.
        return sorted(map(Path, glob.glob(str(images), recursive=True)))  # noqa: PTH207
    if path.is_dir():
        return sorted(table for table in path.glob("*.parquet") if not is_system(table.name))
    return [path] if path.is_file() and path.suffix == ".parquet" else []


def require_list(path: Path) -> Path:
    """Returns the path of a list. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"{path}: expected a folder, a .csv or .jsonl list, or a .parquet file")
    return path


def _list_class_folders(images: Path, classes: list[str] | None) -> ImageListing:
    ignored = []
    folders = []
    skipped = []
    stray = []
    for entry in entries_of(str(images), ignored):
        if is_folder(entry):
            folders.append(entry.name)
        elif is_picture(entry.path):
            stray.append(BadSource(entry.path, entry.name, "lies beside the class folders: move it into one of them"))
        else:
            skipped.append(entry.path)
    if not folders:
        refuse_flat(images, len(stray))
    # Undecodable bytes of a file name are lone surrogates, which are not printable.
    unreadable = [name for name in folders if not name.isprintable()]
    if unreadable:
        names = ", ".join(map(repr, unreadable))
        raise InputError(f"{str(images)!r}: a class name is readable text in UTF-8: rename the folders {names}")
    if not set(folders) <= set(classes or ()):
        _refuse_splits(images, folders)
    pictures = {}
    for name in folders:
        pictures[name] = []
        for path in files_below(str(images / name), ignored):
            if is_picture(path):
                pictures[name].append(path)
            else:
                skipped.append(path)
    report_ignored(ignored)
    if skipped:
        log.warning(f"skipped {len(skipped)} files that are no class's images: {skipped[0]} …")
    empty = [BadSource(str(images / name), name, _NO_IMAGES) for name in folders if not pictures[name]]
    if classes is None:
        classes = [name for name in folders if pictures[name]]
    elif unknown := sorted(set(folders) - set(classes)):
        raise InputError(
            f"{images}: class folders {unknown} are not among the {len(classes)} classes of --classes-from; "
            "rename them or pack the split that has them first"
        )
    labels = {name: label for label, name in enumerate(classes)}
    entries = []
    for name in folders:
        folder = str(images / name)
        for path in pictures[name]:
            key = key_of(name + path.removeprefix(folder))
            entries.append(ImageEntry(key, path, labels[name]))
    return make_listing(classes, entries, [*stray, *empty])


def is_picture(path: str) -> bool:
    """Returns whether a file's name ends as an image's does."""
    _, _, extension = path.rpartition(".")
    return extension.lower() in EXTENSIONS


def is_pattern(path: str | Path) -> bool:
    """Returns whether a path may stand for several files."""
    return any(character in str(path) for character in "*?[")


def _refuse_splits(images: Path, folders: list[str]) -> None:
    """Raises InputError for a folder of splits with class folders: the splits would become the classes."""
    if not all(map(SPLIT.fullmatch, folders)):
        return
    splits = [name for name in folders if any(map(is_folder, entries_of(str(images / name), [])))]
    if not splits:
        return
    # The training split is packed first, because the others take its class list.
    splits.sort(key=lambda name: not name.lower().startswith("train"))
    lines = []
    for name in splits:
        line = f"  python launch/shards.py pack --images {shlex.quote(str(images / name))} --out data/{name}"
        if lines:
            line += f" --classes-from data/{splits[0]}"
        lines.append(line)
    without = ""
    flat = [name for name in folders if name not in splits]
    if flat:
        without = f"; {', '.join(flat)} without class folders need a .csv list of path and label"
    raise InputError(
        f"{images}: its folders {', '.join(folders)} are splits, not classes: pack each by itself{without}; "
        "if they are classes, list the images in a .csv\n" + "\n".join(lines)
    )


class _Row(NamedTuple):
    line: int
    path: str
    label: str


def read_list(path: Path, columns: Sequence[str] = ("path", "label")) -> list[_Row]:
    """Returns the rows of a CSV file with a header, or of JSON lines. Without the column label, labels are empty."""
    try:
        with os.fdopen(files.open_regular(path), newline="", encoding="utf-8-sig") as file:
            lines = iter(lambda: _read_line(file), "")
            table = _csv_rows(path, lines, columns) if path.suffix == ".csv" else _json_rows(lines)
            rows = [_check_row(path, *row, labelled="label" in columns) for row in table]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a {path.suffix} list in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{path}: lists no images")
    return rows


def _read_line(file: TextIO) -> str:
    line = file.readline(MAX_LINE_LENGTH)
    if len(line) == MAX_LINE_LENGTH:
        raise ValueError(f"a line of more than {MAX_LINE_LENGTH:,} characters")
    return line


def _csv_rows(path: Path, lines: Iterator[str], columns: Sequence[str]) -> Iterator[tuple[int, Any, Any]]:
    table = csv.DictReader(lines)
    found = table.fieldnames or ()
    if not set(columns) <= set(found):
        remedy = f"; {UNLABELLED_REMEDY}" if "label" in columns else ""
        raise InputError(
            f"{path}: the first line names the columns, {' and '.join(columns)} among them; "
            f"found {', '.join(found)}{remedy}"
        )
    for row in table:
        yield table.line_num, row["path"], row.get("label")


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = json.loads(line)
        # Whatever is no object is rejected as a row without a path.
        if not isinstance(row, dict):
            row = {}
        yield number, row.get("path"), row.get("label")


def _check_row(
    path: Path,
    line: int,
    where: Any,
    label: Any,
    *,
    labelled: bool,
) -> _Row:
    if not isinstance(where, str) or not where or "\0" in where:
        raise InputError(f"{path}, line {line}: path {where!r}; expected the path of an image")
    if not labelled:
        return _Row(line, where, "")
    # JSON lines may have numbers as labels. To Python true is one as well.
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    name = label.strip() if isinstance(label, str) else ""
    if not name or not name.isprintable():
        raise InputError(f"{path}, line {line}: label {label!r}; expected a class name or number; {UNLABELLED_REMEDY}")
    if are_several(name):
        raise InputError(f"{path}, line {line}: label {label!r} is several numbers; an image has one class")
    return _Row(line, where, name)


def _list_rows(path: Path, classes: list[str] | None) -> ImageListing:
    rows = read_list(path)
    labels = {row.label for row in rows}
    classes, positions = number_classes(labels, classes, str(path))
    return make_listing(classes, entries_of_rows(path, rows, positions))


def entries_of_rows(path: Path, rows: list[_Row], positions: dict[str, int]) -> list[ImageEntry]:
    """Returns the entries of a list's rows, whose labels have `positions` in the class list."""
    folder = path.parent.absolute()
    paths = [os.path.normpath(folder / row.path) for row in rows]
    # Keys are paths below the folder that all images have in common.
    shared = os.path.commonpath({Path(image).parent for image in paths})
    entries = []
    for image, row in zip(paths, rows, strict=True):
        key = key_of(os.path.relpath(image, shared))
        entries.append(ImageEntry(key, image, positions[row.label]))
    return entries


def number_classes(
    labels: set[str],
    classes: list[str] | None,
    where: str,
) -> tuple[list[str], dict[str, int]]:
    """Returns the sorted class list, numbers sorted by their value, and the position of each label in it.

    `classes` fixes the list. Then a label is one of its names; or, where all labels are numbers and no name is one, a
    position in the list. Raises InputError for a label that is neither.
    """
    are_numbers = all(map(is_number, labels))
    if classes is None:
        classes = sorted(labels)
        if are_numbers:
            classes.sort(key=int)
    positions = {name: number for number, name in enumerate(classes)}
    if are_numbers and not any(map(is_number, classes)):
        numbers = {label: int(label) for label in labels}
        check_first(set(numbers.values()), len(classes), where)
        positions = {label: number for label, number in numbers.items() if number < len(classes)}
    unknown = sorted(labels - positions.keys())
    if unknown:
        raise InputError(
            f"{where}: labels {list_first(unknown)} are not among the {len(classes)} classes of --classes-from; "
            "rename them or pack the split that has them first"
        )
    return classes, positions


def _list_tables(paths: list[Path], images: str | Path, classes: list[str] | None) -> ImageListing:
    matches = map(_TABLE_OF_SPLIT.fullmatch, [path.name for path in paths])
    splits = sorted({match[1] for match in matches if match})
    if len(splits) > 1:
        raise InputError(
            f"{images}: holds the splits {', '.join(splits)}; "
            f"name the files of one: --images '{paths[0].parent}/{splits[0]}-*.parquet'"
        )
    columns, names = parquet.read_labels(paths)
    labels = {label for column in columns for label in column if label is not None}
    classes, positions = number_classes(labels, classes or names, str(images))
    return list_rows_of_tables(paths, columns, classes, positions)


def list_rows_of_tables(
    paths: list[Path], columns: list[list[str | None]], classes: list[str], positions: dict[str, int]
) -> ImageListing:
    """Returns the listing of the rows of Parquet files, whose labels are in `columns`, one a file."""
    shared = os.path.commonpath({path.parent for path in paths})
    entries = []
    bad = []
    tables = []
    for path, column in zip(paths, columns, strict=True):
        folder = key_of(os.path.relpath(path, shared))
        rows = []
        for row, label in enumerate(column):
            place = f"{path} row {row}"
            key = f"{folder}/{row:08d}"
            if label is None:
                bad.append(BadSource(place, key, "has no class"))
            else:
                rows.append(row)
                entries.append(ImageEntry(key, place, positions[label]))
        tables.append(Table(path, np.array(rows, np.int64)))
    stats = [(str(path), path.stat()) for path in paths]
    digest = _compute_digest(classes, stats, entries)
    return ImageListing(
        classes,
        entries,
        digest,
        bad,
        tables,
    )


def make_listing(
    classes: list[str],
    entries: list[ImageEntry],
    bad: Sequence[BadSource] = (),
    annotations: Annotations | None = None,
) -> ImageListing:
    """Returns the listing of images in files of their own, sorted by key.

    Images whose files are missing, and all but the first of several with one key, are added to the bad ones.
    """
    unique = []
    duplicates = []
    for entry in sorted(entries):
        if unique and unique[-1].key == entry.key:
            reason = (
                f"it and {unique[-1].place} would both be {entry.key!r} in the shards: rename or remove one of them"
            )
            duplicates.append(BadSource(entry.place, entry.key, reason))
        else:
            unique.append(entry)
    readable = []
    missing = []
    stats = []
    for entry in unique:
        try:
            stats.append((entry.place, Path(entry.place).stat()))
            # A map is a file of its own; objects are encoded already.
            if isinstance(entry.annotation, str):
                stats.append((entry.annotation, Path(entry.annotation).stat()))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            missing.append(BadSource(str(error.filename), entry.key, reason))
        else:
            readable.append(entry)
    digest = _compute_digest(classes, stats, readable)
    return ImageListing(
        classes,
        readable,
        digest,
        [*bad, *duplicates, *missing],
        annotations=annotations,
    )


def _compute_digest(
    classes: list[str],
    stats: Iterable[tuple[str, os.stat_result]],
    entries: list[ImageEntry],
) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for path, stat in stats:
        # Size and time stand for the contents, which would take hours to read.
        digest.update(repr((path, stat.st_size, stat.st_mtime_ns)).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def key_of(path: str) -> str:
    """Returns the key of a file from its path below the data set's folder."""
    folder, slash, name = path.rpartition("/")
    stem, _, _ = name.rpartition(".")
    # WebDataset ends a sample's key at the first dot of its name, so the key itself has none.
    return f"{folder}{slash}{stem or name}".replace(".", "_")
