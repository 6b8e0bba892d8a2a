"""Data sets that a setting names as they come, in a public layout, packed for the run that names them.

ROOT/annotations/SPLIT                   ade20k ┐
ROOT/annotations/instances_SPLIT.json    coco   ┴──find, pack: once──▶ CACHE/LAYOUT-DIGEST, a packed data set
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards import ade20k, coco
from pipeline.shards.cache import Cache
from pipeline.shards.image_sources import ImageListing
from pipeline.shards.index import FORMAT, MANIFEST
from pipeline.shards.pack import pack
from pipeline.shards.process_pool import cores


class _Layout(NamedTuple):
    name: str
    is_meant: Callable[[str | Path], bool]
    digest: Callable[[str | Path], str]
    """Of what `find` would list; another after any change."""
    find: Callable[[str | Path], ImageListing]


_LAYOUTS = (
    _Layout("coco", coco.is_coco, coco.digest, coco.find),
    _Layout("ade20k", ade20k.is_ade20k, lambda path: ade20k.find(path).digest, ade20k.find),
)


def root_of(path: str | Path, cache: str | None = None) -> str | Path:
    """Of the packed data set that a setting names; one in a public layout is packed for it, into `cache`."""
    return packed(path, Path(cache) if cache else None) if _layout_of(path) else path


def packed(path: str | Path, cache: Path | None = None) -> Path:
    """The data set that one in a public layout becomes, packed on first use in `cache`, None meaning where remote
    shards are kept by default.

    A change of any file's name, size or time makes another data set. Of several processes one packs and the others
    wait; what an interrupted one has done is taken up. Raises InputError where the path is of no layout, or anything
    in the data set is wrong.
    """
    layout = _layout_of(path)
    if layout is None:
        raise InputError(f"{path}: neither label maps in ROOT/annotations/SPLIT nor {coco.EXPECTED}")
    digest = fingerprint([FORMAT, layout.digest(path)])[:16]
    out = Cache.default(cache, budget_bytes=0).folder / f"{layout.name}-{digest}"
    with files.locked(out.with_name(f"{out.name}.lock")):
        if not (out / MANIFEST).exists():
            print(f"{path}: packing it into {out}, once", file=sys.stderr)
            pack(layout.find(path), out, workers=cores())
    return out


def is_public(path: str | Path) -> bool:
    """Whether a setting names a data set as it is distributed, which a run packs."""
    return _layout_of(path) is not None


def _layout_of(path: str | Path) -> _Layout | None:
    return next((layout for layout in _LAYOUTS if layout.is_meant(path)), None)
