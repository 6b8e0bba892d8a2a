"""Images with a box, and perhaps a mask, for each object, in the layout of COCO.

    ROOT/annotations/instances_SPLIT.json    categories, images and annotations
    ROOT/SPLIT/FILE_NAME                     ──find──▶ Listing ──pack──▶ shards

Categories become classes in the order of their ids, which may have gaps. Annotations are packed as they are, so that
what pycocotools computes from them is the same: boxes may overhang the image, training cuts them there, and boxes
without area, of which COCO itself has a few, are kept, which training does not see. A box outside the image or with a
negative side is refused; what becomes of odd polygons says objects.packed_form.
"""

import json
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import files_below
from pipeline.shards.image_sources import ImageEntry, ImageListing, key_of, listing
from pipeline.shards.index import MAX_CLASSES
from pipeline.shards.object_annotations import Annotated, BadObjectsError, encode, num_pointless, packed_form

MAX_FILE_BYTES = 4 << 30
"""Of an annotation file, of which Python's objects take several times as much memory. COCO's have 0.5 GB."""
EXPECTED = "ROOT/annotations/instances_SPLIT.json and images in ROOT/SPLIT"


class _Picture(NamedTuple):
    """An entry of images."""

    file_name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]


def is_coco(path: str | Path) -> bool:
    """Whether `path` means an annotation file, and not a packed data set."""
    return "://" not in str(path) and Path(path).suffix == ".json"


def digest(annotations: str | Path) -> str:
    """Of the names, sizes and times of the annotation file and of all files that lie with the images. Raises
    InputError where there are none."""
    path, folder = _places(annotations, None)
    try:
        stats = [(name, os.stat(name)) for name in sorted([str(path), *files_below(str(folder), [])])]  # noqa: PTH116
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def find(annotations: str | Path, images: str | Path | None = None, classes: list[str] | None = None) -> ImageListing:
    """List the images of ROOT/annotations/instances_SPLIT.json, those without annotations too.

    `images` replaces ROOT/SPLIT. `classes` is the list to use, which holds the names of all categories. An image with
    an annotation that cannot be used is listed as bad. Raises InputError for what is wrong with the file as a whole.
    """
    path, folder = _places(annotations, images)
    table = _read(path)
    classes, labels = _classes(path, table["categories"], classes)
    pictures = _pictures(path, table["images"])
    bad = _share_out(path, table.pop("annotations"), pictures)
    entries, taken, num_empty, num_polygons = [], set(), 0, 0
    for number, picture in pictures.items():
        place, key = f"{folder}/{picture.file_name}", key_of(picture.file_name)
        num_polygons += sum(map(num_pointless, picture.annotations))
        try:
            packed = [_packed(each, labels, len(classes), picture, taken) for each in picture.annotations]
        except BadObjectsError as error:
            bad.append(BadSource(place, key, f"{path.name}: {error}"))
            continue
        finally:
            picture.annotations.clear()  # of a large file they take gigabytes
        num_empty += sum(not (annotation["bbox"][2] and annotation["bbox"][3]) for annotation in packed)
        data = encode(Annotated(number, picture.height, picture.width, packed))
        entries.append(ImageEntry(key, place, 0, annotation=data))
    if num_empty:
        print(f"{path}: {num_empty} boxes without area, which training does not see", file=sys.stderr)
    if num_polygons:
        print(f"{path}: left out {num_polygons} polygons of fewer than three points", file=sys.stderr)
    return listing(classes, entries, bad, annotations="objects")


def _places(annotations: str | Path, images: str | Path | None) -> tuple[Path, Path]:
    """The annotation file and the folder of its images."""
    path = Path(os.path.normpath(Path(annotations).absolute()))
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {EXPECTED}")
    folder = Path(images).absolute() if images else None
    if folder is None:
        split = re.fullmatch(r"instances_(.+)\.json", path.name)
        if not split or path.parent.name != "annotations":
            raise InputError(f"{path}: expected {EXPECTED}; for another place give --images as well")
        folder = path.parent.parent / split[1]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected {EXPECTED}")
    return path, folder


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        table = json.loads(files.read(path, MAX_FILE_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    for name in ("images", "annotations", "categories"):
        entries = table.get(name) if isinstance(table, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: no annotations of objects as COCO lays them out: it has no list of {name}")
    if not table["images"]:
        raise InputError(f"{path}: lists no images")
    return table


def _classes(path: Path, categories: list[dict[str, Any]], given: list[str] | None) -> tuple[list[str], dict[int, int]]:
    """The class list, and the position in it of each category's id."""
    names: dict[int, str] = {}
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if type(number) is not int or number in names:
            raise InputError(f"{path}: category {category!r}: expected an id of its own, a whole number")
        if not isinstance(name, str) or not name or not name.isprintable() or name in names.values():
            raise InputError(f"{path}: category {category!r}: expected a name of its own")
        names[number] = name
    if not 0 < len(names) <= MAX_CLASSES:
        raise InputError(f"{path}: {len(names)} categories; at least one and at most {MAX_CLASSES} are expected")
    classes = given or [names[number] for number in sorted(names)]
    if unknown := [name for name in names.values() if name not in classes]:
        raise InputError(
            f"{path}: categories {', '.join(map(repr, unknown[:5]))}{' …' if len(unknown) > 5 else ''} are not among "
            f"the {len(classes)} classes of --classes-from: data sets that are used together have the same classes"
        )
    return classes, {number: classes.index(name) for number, name in names.items()}


def _pictures(path: Path, images: list[dict[str, Any]]) -> dict[int, _Picture]:
    """By their ids, without annotations yet."""
    pictures: dict[int, _Picture] = {}
    for image in images:
        number, file_name, height, width = (image.get(name) for name in ("id", "file_name", "height", "width"))
        if type(number) is not int or number in pictures:
            raise InputError(f"{path}: image {image!r}: expected an id of its own, a whole number")
        if not isinstance(file_name, str) or not _is_below(file_name):
            raise InputError(
                f"{path}: image {number}: file_name {file_name!r}; expected a path below the images' folder"
            )
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            raise InputError(f"{path}: image {number}: height {height!r} and width {width!r}; expected pixels")
        pictures[number] = _Picture(file_name, height, width, [])
    return pictures


def _is_below(file_name: str) -> bool:
    path = PurePosixPath(file_name)
    return file_name.isprintable() and bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _share_out(path: Path, annotations: list[dict[str, Any]], pictures: dict[int, _Picture]) -> list[BadSource]:
    """Give each picture its annotations. What is left: those of no picture."""
    bad = []
    for annotation in annotations:
        number, image = annotation.get("id"), annotation.get("image_id")
        if type(image) is int and image in pictures:
            pictures[image].annotations.append(annotation)
        else:
            reason = f"annotation {number!r} is of image {image!r}, which is not among its images"
            bad.append(BadSource(str(path), f"annotation {number}", reason))
    return bad


def _packed(
    annotation: dict[str, Any], labels: dict[int, int], num_classes: int, picture: _Picture, taken: set[int]
) -> dict[str, Any]:
    """Raises BadObjectsError, also where the annotation's id is among those `taken`, which it then is."""
    category = annotation.get("category_id")
    if type(category) is not int or category not in labels:
        raise BadObjectsError(f"annotation {annotation.get('id')!r}: category_id {category!r} is not among categories")
    packed = packed_form(annotation, labels[category], num_classes, picture.height, picture.width)
    if packed["id"] in taken:
        raise BadObjectsError(f"annotation {packed['id']}: another one has this id")
    taken.add(packed["id"])
    return packed
