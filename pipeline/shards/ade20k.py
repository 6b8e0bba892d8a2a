"""Lists images in the layout of ADE20K's scene parsing challenge: with a class for each pixel.

    ROOT/objectInfo150.txt           the classes: a table with the columns Idx and Name, separated by tabs
    ROOT/images/SPLIT/NAME.jpg       ┐
    ROOT/annotations/SPLIT/NAME.png  ┴──find──▶ ImageListing ──pack──▶ shards

A map has 8 bits a pixel: 0 no label, 1 … K the classes, 255 to be ignored.
"""

import itertools
import logging
import os
from pathlib import Path

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import files_below, report_ignored
from pipeline.shards.image_listing import ImageEntry, ImageListing, key_of, make_listing
from pipeline.shards.image_sources import EXTENSIONS
from pipeline.shards.manifest import MANIFEST

log = logging.getLogger(__name__)

ANNOTATIONS, IMAGES = "annotations", "images"
CLASSES = "objectInfo150.txt"
MAX_CLASSES = 254
"""The number of classes that 8 bits hold beside 0 and 255."""


def is_ade20k(path: str | Path) -> bool:
    """Returns whether `path` means ROOT/annotations/SPLIT, and not a packed data set."""
    if "://" in str(path):
        return False
    folder = Path(path)
    return folder.parent.name == ANNOTATIONS and not (folder / MANIFEST).exists()


def find(annotations: str | Path, images: str | Path | None = None, classes: list[str] | None = None) -> ImageListing:
    """Lists the images of ROOT/annotations/SPLIT and their maps.

    `images` replaces ROOT/images/SPLIT. `classes` are the names of the maps' values 1, 2, …, and must equal those of
    ROOT/objectInfo150.txt where this file exists. Raises InputError.
    """
    maps_folder = Path(os.path.normpath(Path(annotations).absolute()))
    root, inner = _split_path(maps_folder)
    if images is not None:
        images_folder = Path(images).absolute()
    elif root is not None:
        images_folder = root / IMAGES / inner
    else:
        raise InputError(
            f"{annotations}: expected ROOT/{ANNOTATIONS}/SPLIT; for images in another folder give --images as well"
        )
    for folder in (maps_folder, images_folder):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected ROOT/{ANNOTATIONS}/SPLIT and ROOT/{IMAGES}/SPLIT")
    classes = _check_classes(root, classes)
    maps = _find_files(maps_folder, ("png",))
    pictures = _find_files(images_folder, EXTENSIONS)
    if not maps:
        raise InputError(f"{maps_folder}: no label maps; they are files that end in .png")
    # Several images may have one name and different extensions; the listing reports all but the first.
    entries = []
    for name in maps.keys() & pictures.keys():
        for picture in pictures[name]:
            entries.append(ImageEntry(key_of(f"{name}.png"), picture, 0, annotation=maps[name][0]))
    bad = [
        *_find_unpaired(pictures, maps, f"has no map of its name in {maps_folder}"),
        *_find_unpaired(maps, pictures, f"has no image of its name in {images_folder}"),
    ]
    return make_listing(classes, entries, bad, annotations="semantic")


def _find_unpaired(paths: dict[str, list[str]], others: dict[str, list[str]], reason: str) -> list[BadSource]:
    bad = []
    for name in sorted(paths.keys() - others.keys()):
        for path in paths[name]:
            bad.append(BadSource(path, key_of(f"{name}.png"), reason))
    return bad


def _split_path(folder: Path) -> tuple[Path | None, Path]:
    """Returns ROOT, and the path below ROOT/annotations; None and the whole path without such a folder."""
    for parent in folder.parents:
        if parent.name == ANNOTATIONS:
            return parent.parent, folder.relative_to(parent)
    return None, folder


def _find_files(folder: Path, extensions: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the files below a folder by their paths without extension."""
    paths: dict[str, list[str]] = {}
    skipped: list[str] = []
    ignored: list[str] = []
    for path in files_below(str(folder), ignored):
        stem, dot, extension = path.removeprefix(f"{folder}/").rpartition(".")
        if dot and extension.lower() in extensions:
            paths.setdefault(stem, []).append(path)
        else:
            skipped.append(path)
    report_ignored(ignored)
    if skipped:
        log.warning(f"skipped {len(skipped)} files that are not {', '.join(extensions)}: {skipped[0]} …")
    return paths


def _check_classes(root: Path | None, given: list[str] | None) -> list[str]:
    """Returns the class list, given or from ROOT/objectInfo150.txt. Raises InputError where they differ."""
    path = None
    names = None
    if root:
        path = root / CLASSES
        if path.exists():
            names = _read_classes(path)
    classes = given or names
    if classes is None:
        expected = path or f"ROOT/{CLASSES}"
        raise InputError(
            f"{expected}: no such file, which names the classes; or take another data set's: --classes-from"
        )
    if names and classes != names:
        for value, (theirs, ours) in enumerate(itertools.zip_longest(classes, names), 1):
            if theirs == ours:
                continue
            raise InputError(
                f"{path}: {len(names)} classes, but --classes-from has {len(classes)}, and value {value} means "
                f"{ours!r} here and {theirs!r} there: data sets that are used together have the same classes"
            )
    if len(classes) > MAX_CLASSES:
        raise InputError(f"{path or '--classes-from'}: {len(classes)} classes; maps of 8 bits hold {MAX_CLASSES}")
    return classes


def _read_classes(path: Path) -> list[str]:
    """Returns the classes of objectInfo150.txt.

    A name is the whole cell with its synonyms, because the first words of two classes may be the same.
    """
    try:
        header, *rows = files.read(path).decode("utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    columns = [column.strip() for column in header.split("\t")]
    if not {"Idx", "Name"} <= set(columns):
        raise InputError(
            f"{path}: its first line names columns, Idx and Name among them, separated by tabs: {header!r}"
        )
    names: list[str] = []
    for row in filter(str.strip, rows):
        # Trailing cells may be missing.
        cells = dict(zip(columns, map(str.strip, row.split("\t")), strict=False))
        name = cells.get("Name", "")
        number = len(names) + 1
        if cells["Idx"] != str(number) or not name or not name.isprintable() or name in names:
            raise InputError(f"{path}: {row!r}; expected Idx {number} and a Name of its own")
        names.append(name)
    if not names:
        raise InputError(f"{path}: names no classes")
    return names
