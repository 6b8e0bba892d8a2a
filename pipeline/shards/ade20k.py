"""Images with a class for each pixel, in the layout of ADE20K's scene parsing challenge.

    ROOT/objectInfo150.txt           the classes: a table with the columns Idx and Name, set apart by tabs
    ROOT/images/SPLIT/NAME.jpg       ┐
    ROOT/annotations/SPLIT/NAME.png  ┴──find──▶ Listing ──pack──▶ shards

A map has 8 bits: 0 no label, 1 … K the classes, 255 to be ignored.
"""

import itertools
import os
import sys
from pathlib import Path

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import files_below, report_ignored
from pipeline.shards.image_sources import EXTENSIONS, ImageEntry, ImageListing, key_of, listing
from pipeline.shards.index import MANIFEST

ANNOTATIONS, IMAGES = "annotations", "images"
CLASSES = "objectInfo150.txt"
MAX_CLASSES = 254
"""What 8 bits hold beside 0 and 255."""


def is_ade20k(path: str | Path) -> bool:
    """Whether `path` means ROOT/annotations/SPLIT, and not a packed data set."""
    return "://" not in str(path) and Path(path).parent.name == ANNOTATIONS and not (Path(path) / MANIFEST).exists()


def find(annotations: str | Path, images: str | Path | None = None, classes: list[str] | None = None) -> ImageListing:
    """List the images of ROOT/annotations/SPLIT and their maps.

    `images` replaces ROOT/images/SPLIT. `classes` are those of the maps' values 1, 2, …, and may not differ from
    ROOT/objectInfo150.txt where there is such a file. Raises InputError.
    """
    maps_folder = Path(os.path.normpath(Path(annotations).absolute()))
    root, inner = _split(maps_folder)
    images_folder = _images_folder(annotations, root, inner) if images is None else Path(images).absolute()
    for folder in (maps_folder, images_folder):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected ROOT/{ANNOTATIONS}/SPLIT and ROOT/{IMAGES}/SPLIT")
    classes = _classes(root, classes)
    maps, pictures = _files(maps_folder, ("png",)), _files(images_folder, EXTENSIONS)
    if not maps:
        raise InputError(f"{maps_folder}: no label maps; they are files that end in .png")
    paired = maps.keys() & pictures.keys()
    entries = [
        ImageEntry(key_of(f"{name}.png"), picture, 0, annotation=maps[name][0])
        for name in paired
        for picture in pictures[name]
    ]
    bad = [
        BadSource(
            path, key_of(f"{name}.png"), f"has no {'map' if ours is pictures else 'image'} of its name in {other}"
        )
        for ours, other in ((pictures, maps_folder), (maps, images_folder))
        for name, paths in sorted(ours.items())
        if name not in paired
        for path in paths
    ]
    return listing(classes, entries, bad, annotations="semantic")


def _split(folder: Path) -> tuple[Path | None, Path]:
    """ROOT, and what of the path lies below ROOT/annotations."""
    for parent in folder.parents:
        if parent.name == ANNOTATIONS:
            return parent.parent, folder.relative_to(parent)
    return None, folder


def _images_folder(annotations: str | Path, root: Path | None, inner: Path) -> Path:
    if root is None:
        raise InputError(f"{annotations}: expected ROOT/{ANNOTATIONS}/SPLIT; for another place give --images as well")
    return root / IMAGES / inner


def _files(folder: Path, extensions: tuple[str, ...]) -> dict[str, list[str]]:
    """The files below a folder by their path without extension."""
    found: dict[str, list[str]] = {}
    left_out: list[str] = []
    ignored: list[str] = []
    for path in files_below(str(folder), ignored):
        stem, dot, extension = path.removeprefix(f"{folder}/").rpartition(".")
        if dot and extension.lower() in extensions:
            found.setdefault(stem, []).append(path)
        else:
            left_out.append(path)
    report_ignored(ignored)
    if left_out:
        print(f"left out {len(left_out)} files that are not {', '.join(extensions)}: {left_out[0]} …", file=sys.stderr)
    return found


def _classes(root: Path | None, given: list[str] | None) -> list[str]:
    path = root / CLASSES if root else None
    named = _read_classes(path) if path and path.exists() else None
    classes = given or named
    if classes is None:
        place = path or f"ROOT/{CLASSES}"
        raise InputError(f"{place}: no such file, which names the classes; or take another data set's: --classes-from")
    if named and classes != named:
        pairs = itertools.zip_longest(classes, named)
        number, (one, other) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise InputError(
            f"{path}: {len(named)} classes, but --classes-from has {len(classes)}, and value {number} means {other!r} "
            f"here and {one!r} there: data sets that are used together have the same classes"
        )
    if len(classes) > MAX_CLASSES:
        raise InputError(f"{path or '--classes-from'}: {len(classes)} classes; maps of 8 bits hold {MAX_CLASSES}")
    return classes


def _read_classes(path: Path) -> list[str]:
    """The whole names with their synonyms, because the first words of two may be the same."""
    try:
        header, *rows = files.read(path).decode("utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    columns = [column.strip() for column in header.split("\t")]
    if not {"Idx", "Name"} <= set(columns):
        raise InputError(
            f"{path}: its first line names columns, Idx and Name among them, set apart by tabs: {header!r}"
        )
    names: list[str] = []
    for row in filter(str.strip, rows):
        cells = dict(zip(columns, (cell.strip() for cell in row.split("\t")), strict=False))
        name = cells.get("Name", "")
        if cells["Idx"] != str(len(names) + 1) or not name or not name.isprintable() or name in names:
            raise InputError(f"{path}: {row!r}; expected Idx {len(names) + 1} and a Name of its own")
        names.append(name)
    if not names:
        raise InputError(f"{path}: names no classes")
    return names
