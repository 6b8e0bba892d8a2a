"""Packs what a setting names unpacked: data sets in a public layout, as they are distributed, and labelled images.

ROOT/annotations/SPLIT                   ade20k ┐
ROOT/annotations/instances_SPLIT.json    coco   ├──find, pack: once──▶ CACHE/LAYOUT-DIGEST, a packed data set,
class folders, a list or Parquet files   images ┘                      or two with data.val_fraction: train/ and val/
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import ExternalError, InputError
from pipeline.shards import ade20k, coco, image_sources, own_images
from pipeline.shards.cache import Cache
from pipeline.shards.image_listing import ImageListing
from pipeline.shards.manifest import FORMAT
from pipeline.shards.pack import pack
from pipeline.shards.process_pool import cores

log = logging.getLogger(__name__)


class Located(NamedTuple):
    """An unpacked data set that is there."""

    digest: str
    """The digest of what `find` lists, which changes with any file."""
    find: Callable[[], ImageListing]
    """Returns the images with their labels or annotations. Raises InputError."""


class Layout(NamedTuple):
    """A form in which data sets are distributed, or kept."""

    name: str
    is_meant: Callable[[str | Path], bool]
    """Returns whether a path is a data set of this layout: it is asked of every path and URL."""
    locate: Callable[[str | Path, list[str] | None], Located]
    """Looks at the data set of a path. A list of class names fixes the classes. Raises InputError."""
    check: Callable[[str | Path], None] = lambda path: None
    """Raises InputError for what can be seen without listing the data set, before a job waits in a queue."""


def _locate_coco(path: str | Path, classes: list[str] | None) -> Located:
    # Listing reads and encodes all objects, so that is left for packing.
    return Located(coco.digest(path), lambda: coco.find(path))


def _locate_ade20k(path: str | Path, classes: list[str] | None) -> Located:
    maps = ade20k.find(path)
    return Located(maps.digest, lambda: maps)


def _locate_images(path: str | Path, classes: list[str] | None) -> Located:
    images = image_sources.find(path, classes)
    if len(images.classes) < 2:
        raise InputError(
            f"{path}: images of the class {images.classes[0]} alone, of which nothing can be learnt: expected a "
            "folder with a sub-folder for each class"
        )
    return Located(images.digest, lambda: images)


LAYOUTS = [
    Layout("coco", coco.is_coco, _locate_coco),
    Layout("ade20k", ade20k.is_ade20k, _locate_ade20k),
    Layout("images", own_images.is_images, _locate_images, own_images.check_folder),
]
"""The first one counts that a path is meant by."""


def root_of(path: str | Path, cache: str | None = None) -> str | Path:
    """Returns the root of the data set that a setting names. One that is not packed is packed into `cache` first."""
    return packed(path, cache) if is_unpacked(path) else path


def packed(
    path: str | Path,
    cache: str | Path | None = None,
    *,
    classes: list[str] | None = None,
    val_fraction: float | None = None,
) -> Path:
    """Returns the packed form of a data set that is not packed, which is packed into `cache` on first use.

    Without `cache`, it is packed where remote shards are cached by default. `classes` fixes the classes of images, and
    `val_fraction` splits them, see `pack`. A change of any file's name, size or time makes another data set. Of several
    processes one packs and the others wait; interrupted work is continued. Raises InputError where the path has no
    known layout, or anything in the data set is wrong, and ExternalError where the cache's disk is full or fails.
    """
    layout = _find_layout(path)
    if layout is None:
        raise InputError(f"{path}: neither label maps in ROOT/annotations/SPLIT nor {coco.EXPECTED}")
    source = layout.locate(path, classes)
    identity = [FORMAT, source.digest]
    if val_fraction is not None:
        identity.append(str(val_fraction))
    folder = Cache.default(cache, budget_bytes=0).folder
    out = folder / f"{layout.name}-{fingerprint(identity)[:16]}"
    with files.locked(out.with_name(f"{out.name}.lock")):
        # It appears whole, by one rename.
        if not out.exists():
            log.info(f"{path}: packing it into {out}, once")
            try:
                pack(source.find(), out, val_fraction=val_fraction, workers=cores())
            except OSError as error:
                raise ExternalError(
                    f"{out}: cannot be written: {error.strerror}: free some space, or set data.cache to another folder"
                ) from error
    return out


def check(path: str | Path) -> None:
    """Checks an unpacked data set without listing it. Raises InputError."""
    layout = _find_layout(path)
    if layout:
        layout.check(path)


def is_unpacked(path: str | Path) -> bool:
    """Returns whether a setting names a data set as it is distributed, or images, which a run packs."""
    return _find_layout(path) is not None


def _find_layout(path: str | Path) -> Layout | None:
    for layout in LAYOUTS:
        if layout.is_meant(path):
            return layout
    return None
