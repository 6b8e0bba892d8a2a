"""Opens images as they lie: in folders, as single files, in tars, or packed. They are read as a packed data set is.

    paths ──open_images──▶ ImageCollection: parts, one behind the other ──records, read──▶ the feed
                   └─────▶ what cannot be read, with the reasons

Loose images are opened twice: when they are listed, for their size, and when they are fed, for their bytes. Those of
formats or kinds that are not fed become PNGs of what Pillow decodes, in memory.
"""

import glob
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards import images
from pipeline.shards.cache import CacheOptions
from pipeline.shards.class_folders import files_below, is_system, report_ignored
from pipeline.shards.image_header import read_size
from pipeline.shards.image_sources import EXTENSIONS
from pipeline.shards.images import BadImageError
from pipeline.shards.index import MAX_BYTES, RECORD, CorruptSampleError, Int64Array, Records, ShardSet
from pipeline.shards.manifest import MANIFEST, Annotations
from pipeline.shards.open_data import open_data
from pipeline.shards.tar import Reader, TarError, members

log = logging.getLogger(__name__)

# Most headers of JPEGs are shorter.
_HEAD_BYTES = 1 << 16
_HEADER_THREADS = 16
_SHOWN = 20
_KINDS = f"{', '.join(f'.{extension}' for extension in EXTENSIONS)} or .tar"


class Location(NamedTuple):
    """Where the bytes of an image are."""

    name: str
    """The path of a file, or TAR#MEMBER."""
    file: str
    offset: int
    size: int
    """The size in bytes, like the offset."""
    changed: int
    """When the file was changed, in nanoseconds."""

    def load(self, limit: int = MAX_BYTES) -> bytes:
        """Returns the first bytes of the image. Raises OSError."""
        descriptor = files.open_regular(self.file)
        try:
            return os.pread(descriptor, min(self.size, limit), self.offset)
        finally:
            os.close(descriptor)


class LooseImages:
    """Images in files and tars. `sizes` [n, 2] are their heights and widths."""

    def __init__(self, locations: Sequence[Location], sizes: Int64Array) -> None:
        self._locations = locations
        self._sizes = sizes
        self.digest = fingerprint(list(map(list, locations)))

    def __len__(self) -> int:
        return len(self._locations)

    def records(self, rows: Int64Array) -> Records:
        records = np.zeros(len(rows), RECORD)
        records["height"], records["width"] = self._sizes[rows].T
        return records

    def read(self, row: int) -> bytes:
        try:
            data = images.as_fed(self._locations[row].load())
        except (OSError, BadImageError) as error:
            raise CorruptSampleError(str(error)) from error
        if read_size(data) != tuple(self._sizes[row].tolist()):
            raise CorruptSampleError("was changed while it was read")
        return data

    def name(self, row: int) -> str:
        return self._locations[row].name


class PackedShard:
    """The images of one shard of a packed data set."""

    def __init__(self, shards: ShardSet, number: int) -> None:
        self._shards = shards
        self._number = number
        self.digest = f"{shards.digest} {number}"

    def __len__(self) -> int:
        return int(self._shards.shard_samples[self._number])

    def records(self, rows: Int64Array) -> Records:
        return self._shards.index(self._number)[rows]

    def read(self, row: int) -> bytes:
        return self._shards.read(self._number, row)

    def name(self, row: int) -> str:
        return f"{self._shards.url(self._number)}#{self._shards.key(self._number, row)}"


class ImageCollection:
    """Images without labels, an index.SampleSource: a sample is known by its part and its row there."""

    annotations: Annotations | None = "unlabelled"

    def __init__(self, parts: Sequence[LooseImages | PackedShard], unreadable: dict[str, str]) -> None:
        self._parts = parts
        self.unreadable = unreadable
        """The reasons, by name, why images were not taken."""
        self.classes: list[str] = []
        self.shard_samples = np.array([len(part) for part in parts], np.int64)
        self.digest = fingerprint([part.digest for part in parts])

    def __len__(self) -> int:
        return int(self.shard_samples.sum())

    def locate(self, position: int) -> tuple[int, int]:
        """Returns part and row of the sample at a position in the whole."""
        ends = np.cumsum(self.shard_samples)
        part = int(np.searchsorted(ends, position, side="right"))
        return part, position - int(ends[part] - self.shard_samples[part])

    def records(self, shards: Int64Array, rows: Int64Array) -> Records:
        records = np.empty(len(shards), RECORD)
        for part in np.unique(shards):
            chosen = shards == part
            found = self._parts[part].records(rows[chosen])
            for field in ("height", "width", "label"):
                records[field][chosen] = found[field]
        return records

    def read(self, shard: int, row: int) -> bytes:
        return self._parts[shard].read(row)

    def read_annotation(self, shard: int, row: int) -> bytes:
        raise AssertionError("images without annotations")

    def key(self, shard: int, row: int) -> str:
        return self._parts[shard].name(row)

    def url(self, shard: int) -> str:
        return "images"


def open_images(paths: Sequence[str], cache: CacheOptions) -> ImageCollection:
    """Opens folders, patterns, image files, tars and packed data sets, in this order and each once.

    Raises InputError for a path that leads to nothing and where no image can be read.
    """
    parts: list[LooseImages | PackedShard] = []
    unreadable: dict[str, str] = {}
    for is_packed, group in itertools.groupby(dict.fromkeys(paths), _is_packed):
        if is_packed:
            for path in group:
                shards = open_data(path, cache=cache)
                parts += [PackedShard(shards, number) for number in range(len(shards.shard_samples))]
        else:
            parts.append(_read_headers(_find_locations(group, unreadable), unreadable))
    for name, reason in itertools.islice(unreadable.items(), _SHOWN):
        log.warning(f"unreadable: {name}: {reason}")
    if len(unreadable) > _SHOWN:
        log.warning(f"and {len(unreadable) - _SHOWN:,} more that cannot be read")
    collection = ImageCollection([part for part in parts if len(part)], unreadable)
    if not len(collection):
        raise InputError(
            f"none of {len(unreadable)} files can be read as an image: name JPEG, PNG or other image files; the first "
            f"is {next(iter(unreadable))}"
        )
    return collection


def _is_packed(path: str) -> bool:
    return "://" in path or Path(path, MANIFEST).exists()


def _find_locations(paths: Iterable[str], unreadable: dict[str, str]) -> Iterator[Location]:
    found = [file for path in paths for file in _find_files(path)]
    for file in dict.fromkeys(found):
        try:
            status = os.stat(file)  # noqa: PTH116
            if file.endswith(".tar"):
                yield from _find_members(file, status.st_mtime_ns)
            else:
                yield Location(file, file, 0, status.st_size, status.st_mtime_ns)
        except OSError as error:
            unreadable[file] = error.strerror or str(error)
        except TarError as error:
            unreadable[file] = str(error)


def _find_files(path: str) -> list[str]:
    """Returns the image files and tars of a path. Raises InputError where there are none."""
    if Path(path).is_dir():
        ignored: list[str] = []
        below = list(files_below(path, ignored))
        report_ignored(ignored)
        found = [file for file in below if file.rpartition(".")[2].lower() in (*EXTENSIONS, "tar")]
        if not found:
            raise InputError(f"{path}: has no image among its {len(below)} files: they end in {_KINDS}")
        if len(found) < len(below):
            log.info(f"{path}: {len(below) - len(found)} other files are skipped")
        return found
    if Path(path).exists():
        return [path]
    # Path.glob takes no absolute pattern.
    matching = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
    if not matching:
        raise InputError(f"{path}: no such file or folder: name a folder, a pattern, image files, tars or a packed set")
    return [file for match in matching for file in _find_files(match)]


def _find_members(tar: str, changed: int) -> Iterator[Location]:
    """Yields the images of a tar. Raises TarError behind the last that can be found, OSError, and InputError for a tar
    without images."""
    is_empty = True
    with os.fdopen(files.open_regular(tar), "rb") as stream:
        for member in members(Reader(stream)):
            extension = member.name.rpartition(".")[2].lower()
            if member.kind == "file" and extension in EXTENSIONS and not is_system(member.name):
                is_empty = False
                yield Location(f"{tar}#{member.name}", tar, member.offset, member.size, changed)
    if is_empty:
        raise InputError(f"{tar}: has no images: its members do not end in {_KINDS}")


def _read_headers(locations: Iterable[Location], unreadable: dict[str, str]) -> LooseImages:
    """Returns the images that have a readable header. The others go to `unreadable`."""
    readable: list[Location] = []
    sizes: list[tuple[int, int]] = []
    with ThreadPoolExecutor(_HEADER_THREADS, "header") as pool:
        for location, size in pool.map(_read_header, locations):
            if isinstance(size, str):
                unreadable[location.name] = size
            else:
                readable.append(location)
                sizes.append(size)
    return LooseImages(readable, np.array(sizes, np.int64).reshape(-1, 2))


def _read_header(location: Location) -> tuple[Location, tuple[int, int] | str]:
    """Returns height and width of an image, or the reason why there are none."""
    try:
        if location.size > MAX_BYTES:
            raise BadImageError(f"more than {MAX_BYTES:,} bytes")
        head = location.load(_HEAD_BYTES)
        try:
            size = images.size(head)
        except BadImageError:
            if len(head) == location.size:
                raise
            size = images.size(location.load())
        if max(size) > images.MAX_SIDE_PX:
            raise BadImageError(f"no side may exceed {images.MAX_SIDE_PX} pixels")
    except OSError as error:
        return location, error.strerror or str(error)
    except BadImageError as error:
        return location, str(error)
    return location, size
