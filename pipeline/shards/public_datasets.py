"""Packs data sets that a setting names in a public layout, as they are distributed.

ROOT/annotations/SPLIT                   ade20k ┐
ROOT/annotations/instances_SPLIT.json    coco   ┴──find, pack: once──▶ CACHE/LAYOUT-DIGEST, a packed data set
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards import ade20k, coco
from pipeline.shards.cache import Cache
from pipeline.shards.image_sources import ImageListing
from pipeline.shards.manifest import FORMAT, MANIFEST
from pipeline.shards.pack import pack
from pipeline.shards.process_pool import cores

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """A form in which data sets are distributed."""

    name: str
    is_meant: Callable[[str | Path], bool]
    """Returns whether a path is a data set of this layout, by its name: it is asked of every path and URL."""
    digest: Callable[[str | Path], str]
    """Returns the digest of what `find` would list, which changes with any file."""
    find: Callable[[str | Path], ImageListing]
    """Returns the images with their labels or annotations. Raises InputError."""


LAYOUTS = [
    Layout("coco", coco.is_coco, coco.digest, coco.find),
    Layout("ade20k", ade20k.is_ade20k, lambda path: ade20k.find(path).digest, ade20k.find),
]
"""The first one counts that a path is meant by."""


def root_of(path: str | Path, cache: str | None = None) -> str | Path:
    """Returns the root of the data set that a setting names. One in a public layout is packed into `cache` first."""
    if not is_public(path):
        return path
    return packed(path, Path(cache) if cache else None)


def packed(path: str | Path, cache: Path | None = None) -> Path:
    """Returns the packed form of a data set in a public layout, which is packed into `cache` on first use.

    Without `cache`, it is packed where remote shards are cached by default. A change of any file's name, size or time
    makes another data set. Of several processes one packs and the others wait; interrupted work is continued. Raises
    InputError where the path has no known layout, or anything in the data set is wrong.
    """
    layout = _find_layout(path)
    if layout is None:
        raise InputError(f"{path}: neither label maps in ROOT/annotations/SPLIT nor {coco.EXPECTED}")
    digest = fingerprint([FORMAT, layout.digest(path)])[:16]
    folder = Cache.default(cache, budget_bytes=0).folder
    out = folder / f"{layout.name}-{digest}"
    with files.locked(out.with_name(f"{out.name}.lock")):
        if not (out / MANIFEST).exists():
            log.info(f"{path}: packing it into {out}, once")
            pack(layout.find(path), out, workers=cores())
    return out


def is_public(path: str | Path) -> bool:
    """Returns whether a setting names a data set as it is distributed, which a run packs."""
    return _find_layout(path) is not None


def _find_layout(path: str | Path) -> Layout | None:
    for layout in LAYOUTS:
        if layout.is_meant(path):
            return layout
    return None
