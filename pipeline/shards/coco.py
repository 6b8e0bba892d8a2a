"""Lists images in the layout of COCO: with a box, and optionally a mask, for each object.

    ROOT/annotations/instances_SPLIT.json    categories, images and annotations
    ROOT/SPLIT/FILE_NAME                     ──find──▶ ImageListing ──pack──▶ shards

Categories become classes in the order of their ids, which may have gaps. Annotations are packed as they are, so that
pycocotools computes the same from them. Boxes may extend beyond the image, and training clips them. Boxes without area,
of which COCO itself has a few, are kept, and training ignores them. A box outside the image or with a negative side is
rejected. object_annotations.packed_form says what happens to odd polygons.
"""

import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.class_folders import files_below
from pipeline.shards.image_listing import ImageEntry, ImageListing, key_of, make_listing
from pipeline.shards.manifest import MAX_CLASSES
from pipeline.shards.object_annotations import Annotated, BadObjectsError, encode, num_pointless, packed_form
from pipeline.value_text import list_first

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 30
"""The limit for an annotation file, which takes several times as much memory in Python. COCO's have 0.5 GB."""
EXPECTED = "ROOT/annotations/instances_SPLIT.json and images in ROOT/SPLIT"


class _Picture(NamedTuple):
    """An entry of the file's list of images, with its annotations."""

    file_name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]


def is_coco(path: str | Path) -> bool:
    """Returns whether `path` means an annotation file, and not a packed data set."""
    return "://" not in str(path) and Path(path).suffix == ".json"


def digest(annotations: str | Path) -> str:
    """Returns the digest of the names, sizes and times of the annotation file and of all files beside the images.

    Raises InputError where the annotation file or the images' folder is missing.
    """
    path, folder = _locate(annotations, None)
    entries = []
    try:
        for name in sorted([str(path), *files_below(str(folder), [])]):
            # Faster than pathlib, and COCO has 123,000 images.
            status = os.stat(name)  # noqa: PTH116
            entries.append((name, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return fingerprint(entries)


def find(annotations: str | Path, images: str | Path | None = None, classes: list[str] | None = None) -> ImageListing:
    """Lists the images of ROOT/annotations/instances_SPLIT.json, those without annotations too.

    `images` replaces ROOT/SPLIT. `classes` is the class list to use, which must hold the names of all categories. An
    image with an annotation that cannot be used is listed as bad. Raises InputError for problems with the whole file.
    """
    path, folder = _locate(annotations, images)
    table = _read_table(path)
    classes, labels = _number_categories(path, table["categories"], classes)
    pictures = _read_pictures(path, table["images"])
    bad = _assign_annotations(path, table.pop("annotations"), pictures)
    entries = []
    used_ids = set()
    num_empty = 0
    num_polygons = 0
    for number, picture in pictures.items():
        place = f"{folder}/{picture.file_name}"
        key = key_of(picture.file_name)
        num_polygons += sum(map(num_pointless, picture.annotations))
        packed = []
        try:
            for annotation in picture.annotations:
                packed.append(
                    _pack_annotation(
                        annotation,
                        labels,
                        len(classes),
                        picture,
                        used_ids,
                    )
                )
        except BadObjectsError as error:
            bad.append(BadSource(place, key, f"{path.name}: {error}"))
            continue
        finally:
            # The annotations of a large file take gigabytes.
            picture.annotations.clear()
        for annotation in packed:
            _, _, width, height = annotation["bbox"]
            num_empty += width == 0 or height == 0
        data = encode(Annotated(number, picture.height, picture.width, packed))
        entries.append(ImageEntry(key, place, 0, annotation=data))
    if num_empty:
        log.warning(f"{path}: {num_empty} boxes without area, which training ignores")
    if num_polygons:
        log.warning(f"{path}: skipped {num_polygons} polygons of fewer than three points")
    return make_listing(classes, entries, bad, annotations="objects")


def _locate(annotations: str | Path, images: str | Path | None) -> tuple[Path, Path]:
    """Returns the annotation file and the folder of its images."""
    path = Path(os.path.normpath(Path(annotations).absolute()))
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {EXPECTED}")
    if images:
        folder = Path(images).absolute()
    else:
        match = re.fullmatch(r"instances_(.+)\.json", path.name)
        if not match or path.parent.name != "annotations":
            raise InputError(f"{path}: expected {EXPECTED}; for images in another folder give --images as well")
        folder = path.parent.parent / match[1]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected {EXPECTED}")
    return path, folder


def _read_table(path: Path) -> dict[str, list[dict[str, Any]]]:
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


def _number_categories(
    path: Path,
    categories: list[dict[str, Any]],
    given: list[str] | None,
) -> tuple[list[str], dict[int, int]]:
    """Returns the class list, and the position in it of each category's id."""
    names: dict[int, str] = {}
    for category in categories:
        number = category.get("id")
        name = category.get("name")
        if type(number) is not int or number in names:
            raise InputError(f"{path}: category {category!r}: expected an id of its own, a whole number")
        if not isinstance(name, str) or not name or not name.isprintable() or name in names.values():
            raise InputError(f"{path}: category {category!r}: expected a name of its own")
        names[number] = name
    if not 0 < len(names) <= MAX_CLASSES:
        raise InputError(f"{path}: {len(names)} categories; at least one and at most {MAX_CLASSES} are expected")
    classes = given or [names[number] for number in sorted(names)]
    unknown = [name for name in names.values() if name not in classes]
    if unknown:
        raise InputError(
            f"{path}: categories {list_first(unknown)} are not among the {len(classes)} classes of --classes-from: "
            "data sets that are used together have the same classes"
        )
    labels = {number: classes.index(name) for number, name in names.items()}
    return classes, labels


def _read_pictures(path: Path, images: list[dict[str, Any]]) -> dict[int, _Picture]:
    """Returns the images by their ids, without annotations yet."""
    pictures: dict[int, _Picture] = {}
    for image in images:
        number = image.get("id")
        file_name = image.get("file_name")
        height = image.get("height")
        width = image.get("width")
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
    if not file_name.isprintable() or not path.name:
        return False
    return not path.is_absolute() and ".." not in path.parts


def _assign_annotations(
    path: Path,
    annotations: list[dict[str, Any]],
    pictures: dict[int, _Picture],
) -> list[BadSource]:
    """Adds the annotations to their pictures, and returns those whose picture is not listed."""
    bad = []
    for annotation in annotations:
        number = annotation.get("id")
        image = annotation.get("image_id")
        # By type, because true and 1.0 would be found under the key 1.
        if type(image) is int and image in pictures:
            pictures[image].annotations.append(annotation)
        else:
            reason = f"annotation {number!r} is of image {image!r}, which is not among its images"
            bad.append(BadSource(str(path), f"annotation {number}", reason))
    return bad


def _pack_annotation(
    annotation: dict[str, Any],
    labels: dict[int, int],
    num_classes: int,
    picture: _Picture,
    used_ids: set[int],
) -> dict[str, Any]:
    """Returns an annotation as it is packed, and adds its id to `used_ids`.

    Raises BadObjectsError, also where the id is used already.
    """
    category = annotation.get("category_id")
    if type(category) is not int or category not in labels:
        raise BadObjectsError(f"annotation {annotation.get('id')!r}: category_id {category!r} is not among categories")
    packed = packed_form(
        annotation,
        labels[category],
        num_classes,
        picture.height,
        picture.width,
    )
    number = packed["id"]
    if number in used_ids:
        raise BadObjectsError(f"annotation {number}: another one has this id")
    used_ids.add(number)
    return packed
