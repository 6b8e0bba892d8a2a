"""Lists what to pack: every image with its key and class.

    DIR/CLASS/**/NAME.jpg                 ┐
    LIST.csv, LIST.jsonl: path, label     ├──▶ ImageListing: classes, entries sorted by key, digest
    FILE.parquet, DIR/*.parquet           │
    annotations and images: ade20k.py,    │
                            coco.py       │
    tars: foreign_tars.py, imagenet.py    ┘

Images are only listed here and not opened, so that a mistake is reported before hours of work. The listing takes some
400 bytes of memory an image.
"""

import csv
import glob
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards import parquet
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import entries_of, files_below, is_folder, is_system, refuse_flat, report_ignored
from pipeline.shards.image_listing import (
    ImageEntry,
    ImageListing,
    Rows,
    identify_file,
    key_of,
    list_containers,
    make_listing,
    number_classes,
)
from pipeline.shards.labels import UNLABELLED_REMEDY, are_several
from pipeline.shards.part_names import USUAL, PartNames, Use, describe_parts, guess_use, separator_behind

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


def find(
    images: str | Path,
    classes: list[str] | None = None,
    names: PartNames = USUAL,
) -> ImageListing:
    """Lists the images of class folders, of a list or of Parquet files. `classes` fixes the class list.

    `names` has the columns of a list or of Parquet files. Raises InputError for what cannot be listed, and for a class
    that is not in `classes`.
    """
    if tables := find_tables(images):
        return _list_tables(tables, images, classes, names)
    path = Path(images)
    if not path.is_dir():
        return _list_rows(require_list(path), classes, names)
    if names != USUAL:
        raise InputError(f"{images}: --image and --label name columns, and class folders have none: remove them")
    return _list_class_folders(path, classes)


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


def read_list(path: Path, image: str = "path", label: str | None = "label") -> list[_Row]:
    """Returns the rows of a CSV file with a header, or of JSON lines, by the columns of paths and labels.

    Without `label`, labels are empty. Raises InputError.
    """
    names = PartNames(image, label)
    try:
        with os.fdopen(files.open_regular(path), newline="", encoding="utf-8-sig") as file:
            lines = iter(lambda: _read_line(file), "")
            table = _csv_rows(path, lines, names) if path.suffix == ".csv" else _json_rows(path, lines, names)
            rows = [_check_row(path, *row, labelled=label is not None) for row in table]
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


def _csv_rows(path: Path, lines: Iterator[str], names: PartNames) -> Iterator[tuple[int, Any, Any]]:
    table = csv.DictReader(lines)
    columns = table.fieldnames or ()
    if not _expected(names) <= set(columns):
        row = next(table, dict.fromkeys(columns))
        raise InputError(
            f"{path}: the first line names the columns, {' and '.join(filter(None, names))} among them; "
            f"{_describe_columns(path, row, names)}"
        )
    for row in table:
        yield table.line_num, row[names.image or ""], row.get(names.label or "")


def _json_rows(path: Path, lines: Iterator[str], names: PartNames) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = json.loads(line)
        # Whatever is no object is rejected as a row without a path.
        if not isinstance(row, dict):
            row = {}
        if row and not _expected(names) <= row.keys():
            raise InputError(
                f"{path}, line {number}: expected {' and '.join(filter(None, names))}; "
                f"{_describe_columns(path, row, names)}"
            )
        yield number, row.get(names.image), row.get(names.label)


def _expected(names: PartNames) -> set[str]:
    return set(filter(None, names))


def _describe_columns(path: Path, row: dict[str, Any], names: PartNames) -> str:
    uses: dict[str, Use] = {}
    for name, value in row.items():
        uses[name] = "image" if isinstance(value, str) and is_picture(value) else guess_use(value)
    described = describe_parts(uses, f"pack --images {shlex.quote(str(path))} --out DIR", names)
    return f"{described}{separator_behind(described)}{UNLABELLED_REMEDY}" if names.label else described


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


def _list_rows(path: Path, classes: list[str] | None, names: PartNames) -> ImageListing:
    rows = read_list(path, names.image or "path", names.label or "label")
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


def _list_tables(
    paths: list[Path],
    images: str | Path,
    classes: list[str] | None,
    names: PartNames,
) -> ImageListing:
    matches = map(_TABLE_OF_SPLIT.fullmatch, [path.name for path in paths])
    splits = sorted({match[1] for match in matches if match})
    if len(splits) > 1:
        raise InputError(
            f"{images}: holds the splits {', '.join(splits)}; "
            f"name the files of one: --images '{paths[0].parent}/{splits[0]}-*.parquet'"
        )
    image = names.image or parquet.IMAGE
    columns, class_names = parquet.read_labels(paths, image, names.label or parquet.LABEL)
    return list_containers(rows_of_tables(paths, columns, image), classes or class_names, str(images))


def rows_of_tables(paths: list[Path], columns: list[list[str | None]], image: str = parquet.IMAGE) -> list[Rows]:
    """Returns the rows of Parquet files, whose labels are in `columns`, one a file."""
    shared = os.path.commonpath({path.parent for path in paths})
    containers = []
    for path, column in zip(paths, columns, strict=True):
        folder = key_of(os.path.relpath(path, shared))
        rows = [(row, f"{folder}/{row:08d}", f"{path} row {row}", label) for row, label in enumerate(column)]
        containers.append(Rows(parquet.Table(path, image), rows, identify_file(path)))
    return containers
