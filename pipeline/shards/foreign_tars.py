"""Lists and reads the images of tars that have to be packed: compressed, linked, sparse, of any format and order.

    URLS ──find──▶ Tars ──scan_tars: headers and labels──▶ TarScans ──list_scans──▶ ImageListing
    Tar ──read_images: webdataset's iterator over a stream of our stores──▶ images, which spill.py sorts

A sample is all members of one key, wherever in the tar they lie. Headers are read by tar.py, which finds damage that
Python's tarfile, and so webdataset, takes for the end. Neither webdataset's decoders nor its openers, which run shells,
are used. Only people may give a pipe:COMMAND, because a shell runs it.
"""

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import shlex
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from braceexpand import braceexpand

from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.shards import images
from pipeline.shards.bad_samples import BadSource, first_few
from pipeline.shards.class_folders import is_system
from pipeline.shards.filesystems import RangeReader
from pipeline.shards.image_listing import ImageListing, Rows, identify_file, list_containers
from pipeline.shards.image_sources import EXTENSIONS, SPLIT, is_pattern
from pipeline.shards.index import key_and_extension
from pipeline.shards.index_tars import find_names, open_store, split_root
from pipeline.shards.labels import is_number, number_names
from pipeline.shards.manifest import MAX_CLASSES
from pipeline.shards.part_names import (
    MAX_LABEL_BYTES,
    NO_LABEL,
    BadLabelError,
    PartNames,
    describe_parts,
    read_folder,
    read_label,
)
from pipeline.shards.process_pool import advance, map_tasks
from pipeline.shards.scan_tar import leads_out, look_at_parts
from pipeline.shards.spill import Int64Array
from pipeline.shards.tar import Member, Reader, TarError, members

PIPE = "pipe:"
# What damaged bytes raise, maps of sparse files and TarError a ValueError. A store that fails is another matter.
_DAMAGED = (EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


class Tar(NamedTuple):
    """A tar, which may lie inside another; a spill.Source."""

    root: str
    """The folder, or the URL with its query; PIPE for the output of a command."""
    name: str
    prefix: str
    """What begins the keys of its samples."""
    names: PartNames
    start: int = 0
    """The offset in bytes of a tar inside another."""
    size: int | None = None

    @property
    def place(self) -> str:
        if self.root == PIPE:
            return f"{PIPE}{self.name}"
        url = open_store(self.root).url(self.name)
        return url if self.size is None else f"{url}#{self.prefix}"

    def is_image(self, name: str) -> bool:
        """Returns whether a member's name is that of an image."""
        _, extension = key_and_extension(name)
        return extension in self.names.image_parts(EXTENSIONS) and not is_system(name)

    def read_images(self, rows: Int64Array) -> Iterator[tuple[int, bytes]]:
        # Imported late: its package imports torch.
        from webdataset.tariterators import tar_file_iterator

        wanted = sorted(set(rows.tolist()))
        chosen = set(wanted)
        numbers = itertools.count()
        count = 0
        try:
            with _open(self) as stream:
                found = tar_file_iterator(
                    stream,  # pyright: ignore[reportArgumentType]
                    skip_meta=None,
                    select_files=lambda name: self.is_image(name) and next(numbers) in chosen,
                )
                for row, member in zip(wanted, found, strict=False):
                    yield row, member["data"]
                    count += 1
        # An OSError may pass, and what was packed by then stays.
        except _DAMAGED as error:
            raise InputError(f"{self.place}: could be listed and cannot be read: {error}: make it again") from error
        if count < len(wanted):
            raise InputError(f"{self.place}: was changed while it was packed: give the same command again")


@dataclass
class TarScan:
    tar: Tar
    rows: list[int] = field(default_factory=list)
    """The numbers of the samples' images among the tar's images, in rising order."""
    keys: list[str] = field(default_factory=list)
    """The keys of these samples, without the tar's prefix."""
    labels: list[str | None] = field(default_factory=list)
    """What their members for labels hold; None without one."""
    bad: list[BadSource] = field(default_factory=list)
    identity: str = ""
    """A text that changes with the names, sizes and order of the members."""


def find(urls: Sequence[str], names: PartNames, classes: list[str] | None, workers: int) -> ImageListing:
    """Lists the images of tars: of folders, patterns with * or {000..146}, URLs and pipe:COMMANDs.

    Labels are where `names` says, or else in .cls members or the names of folders. Raises InputError where nothing can
    be packed.
    """
    tars = _find_tars(urls, names)
    _refuse_splits(tars)
    scans = scan_tars(tars, workers)
    where = redact(shlex.join(urls))
    if names.label == NO_LABEL:
        for scan in scans:
            scan.labels = [""] * len(scan.keys)
        listing = list_scans(scans, [""], where)
        return _require_images(replace(listing, classes=[], annotations="unlabelled"), where)
    has_labels = any(label is not None for scan in scans for label in scan.labels)
    has_folders = any("/" in key for scan in scans for key in scan.keys)
    if names.label == "folder" or (names.label is None and has_folders and not has_labels):
        for scan in scans:
            scan.labels = list(map(_label_of_folder, scan.keys))
    else:
        classes = _number_classes(scans, classes, where)
    listing = list_scans(scans, classes, where)
    if listing.entries:
        return listing
    message = f"{where}: not one image with a label:\n{first_few(listing.bad)}"
    with contextlib.suppress(OSError, *_DAMAGED), _open(tars[0]) as stream:
        parts = describe_parts(look_at_parts(stream), f"pack --tars {where} --out DIR", names)
        message += f"\n{tars[0].place}: {parts}"
    raise InputError(message)


def _require_images(listing: ImageListing, where: str) -> ImageListing:
    if not listing.entries:
        raise InputError(f"{where}: not one image can be packed:\n{first_few(listing.bad)}")
    return listing


def list_scans(scans: list[TarScan], classes: list[str] | None, where: str) -> ImageListing:
    """Returns the listing of the images of tars. `classes` fixes the class list."""
    containers = []
    for scan in scans:
        place = scan.tar.place
        rows = []
        for row, key, label in zip(scan.rows, scan.keys, scan.labels, strict=True):
            rows.append((row, f"{scan.tar.prefix}/{key}", f"{place}#{key}", label))
        containers.append(Rows(scan.tar, rows, scan.identity))
    listing = list_containers(containers, classes, where)
    bad = [fault for scan in scans for fault in scan.bad]
    return replace(listing, bad=bad + listing.bad)


def _find_tars(urls: Sequence[str], names: PartNames) -> list[Tar]:
    """Returns all tars, each once. Raises InputError for what is none."""
    places: dict[tuple[str, str], str] = {}
    for url in urls:
        if url.startswith(PIPE):
            for command in braceexpand(url.removeprefix(PIPE)):
                places[PIPE, command] = f"pipe-{len(places):05d}"
            continue
        is_glob = "://" not in url and is_pattern(url) and not Path(url).exists()
        # Path.glob takes no absolute pattern.
        for match in sorted(glob.glob(url, recursive=True)) if is_glob else [url]:  # noqa: PTH207
            root, query, tars = split_root(match)
            store = open_store(root + query)
            if not tars and store.is_local and not Path(root).is_dir():
                raise InputError(f"{redact(match)}: neither a folder nor a name of tars, which end in .tar or .tar.gz")
            for name in tars or find_names(store):
                places[root + query, name] = store.url(name)
    if not places:
        raise InputError(f"{redact(shlex.join(urls))}: no such tars; * stands for any text, {{000..146}} for numbers")
    prefixes = _name_prefixes(list(places.values()))
    return [Tar(root, name, prefix, names) for (root, name), prefix in zip(places, prefixes, strict=True)]


def _name_prefixes(places: list[str]) -> list[str]:
    """Returns the names of tars below the folder that all have in common, without dots. Raises InputError for twins."""
    folders = [place.split("/")[:-1] for place in places]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    num_shared = len(list(shared))
    prefixes: dict[str, str] = {}
    for place in places:
        name = "/".join(place.split("/")[num_shared:])
        prefix = re.sub(r"\.(tar(\.\w+)?|tgz)$", "", name).replace(".", "_")
        if prefix in prefixes:
            raise InputError(f"{prefixes[prefix]} and {place} would give the same keys: name only one of them")
        prefixes[prefix] = place
    return list(prefixes)


def _refuse_splits(tars: list[Tar]) -> None:
    """Raises InputError for tars of several splits, whose images would be mixed."""
    splits: dict[str, str] = {}
    for tar in tars:
        words = [word.lower() for word in re.split("[-_/]", tar.prefix) if SPLIT.fullmatch(word)]
        splits.setdefault(" ".join(words), tar.place)
    if len(splits) > 1:
        listed = ", ".join(f"{place} ({split or 'no split'})" for split, place in splits.items())
        raise InputError(f"tars of several splits, such as {listed}: pack each split by itself, with its own pattern")


def _label_of_folder(key: str) -> str | None:
    with contextlib.suppress(BadLabelError):
        return read_folder(key)
    return None


def _number_classes(scans: list[TarScan], classes: list[str] | None, where: str) -> list[str] | None:
    """Returns the classes "0", "1", … where most labels are numbers, as `index` does; None where they are names.

    Labels that are no numbers then become None. `classes` are returned where they are given.
    """
    counts = Counter(label for scan in scans for label in scan.labels if label is not None)
    numbers = {label: str(int(label)) for label in counts if is_number(label) and int(label) < MAX_CLASSES}
    if 2 * sum(map(counts.__getitem__, numbers)) <= counts.total():
        return classes
    for scan in scans:
        scan.labels = [numbers.get(label or "") for label in scan.labels]
    return classes or number_names(set(map(int, numbers)), where)


def scan_tars(tars: list[Tar], workers: int) -> list[TarScan]:
    """Reads the headers and labels of tars, and no images where a stream can seek."""
    workers = min(workers, len(tars))
    return list(map_tasks(_scan_tar, tars, workers=workers, total=len(tars), name="listing", unit="tar"))


def _scan_tar(tar: Tar) -> TarScan:
    samples = _Samples(tar)
    damage = None
    try:
        with _open(tar) as stream:
            samples.read(Skimmer(stream))
    except FileNotFoundError:
        damage = "no such file"
    except (OSError, *_DAMAGED) as error:
        damage = str(error)
    advance()
    return samples.finish(damage)


@dataclass(slots=True)
class _Sample:
    first: str
    """The extension of its first member."""
    row: int = -1
    image: str = ""
    """The extension of its image."""
    label: str | None = None
    fault: str | None = None


class _Samples:
    """The samples of a tar while its members are listed."""

    def __init__(self, tar: Tar) -> None:
        self._tar = tar
        self._samples: dict[str, _Sample] = {}
        self._links: list[Member] = []
        self._digest = hashlib.sha256()
        self._num_images = 0
        self._last: tuple[_Sample, int] | None = None
        """The sample of the last image, and where the image ends."""

    def read(self, reader: Reader) -> None:
        """Lists the members of a tar. Raises what _DAMAGED has; what came before stays listed."""
        try:
            for member in members(reader):
                advance(0)
                self._add(member, reader)
        except (OSError, *_DAMAGED):
            # It may end in the middle of the last image.
            if self._last and self._last[1] > reader.position:
                self._last[0].fault = "its image is cut short"
            raise

    def _add(self, member: Member, reader: Reader) -> None:
        self._digest.update(repr(member).encode())
        key, extension = _split_name(member.name)
        is_ignored = member.kind == "folder" or is_system(member.name) or not extension
        if is_ignored and not leads_out(member.name):
            return
        is_image = self._tar.is_image(member.name)
        sample = self._samples.setdefault(key, _Sample(extension))
        if leads_out(member.name):
            sample.fault = f"has the name {member.name!r}, which leads out of the tar"
        elif member.kind == "link":
            self._links.append(member)
        elif is_image and member.kind in ("file", "sparse"):
            self._set_image(sample, extension, self._num_images)
            self._last = sample, member.offset + member.size
            if member.whole_size > images.MAX_SCALED_BYTES:
                sample.fault = f"its image has more than {images.MAX_SCALED_BYTES:,} bytes"
        elif extension == self._tar.names.label_part:
            self._read_label(sample, member, reader)
        elif is_image:
            sample.fault = f"its {extension} part is no ordinary file"
        self._num_images += is_image and member.kind in ("file", "sparse")

    def _set_image(self, sample: _Sample, extension: str, row: int) -> None:
        if sample.row >= 0:
            sample.fault = f"a second image of this key: {sample.image} and {extension}"
        sample.row = row
        sample.image = extension

    def _read_label(self, sample: _Sample, member: Member, reader: Reader) -> None:
        try:
            if sample.label is not None:
                raise BadLabelError("a second label of this key")
            if member.kind != "file" or member.size > MAX_LABEL_BYTES:
                raise BadLabelError(f"its label is no ordinary file of up to {MAX_LABEL_BYTES:,} bytes")
            sample.label = read_label(reader.take(member.size), self._tar.names.label or "cls")
        except BadLabelError as error:
            sample.fault = str(error)

    def _follow_links(self) -> None:
        for member in self._links:
            key, extension = _split_name(member.name)
            target_key, target_extension = _split_name(member.target)
            sample, target = self._samples[key], self._samples.get(target_key)
            if self._tar.is_image(member.name) and target and target.row >= 0 and target.image == target_extension:
                self._set_image(sample, extension, target.row)
            elif extension == self._tar.names.label_part == target_extension and target and target.label is not None:
                sample.label = target.label
            elif self._tar.is_image(member.name) or extension == self._tar.names.label_part:
                sample.fault = f"its {extension} part is a link to {member.target!r}, which is none of this tar"

    def finish(self, damage: str | None) -> TarScan:
        """Returns the samples that can be packed, and the others as faults."""
        self._follow_links()
        place = self._tar.place
        identity = f"{place} {self._digest.hexdigest()}"
        if "://" not in place and Path(self._tar.root, self._tar.name).exists():
            identity += identify_file(Path(self._tar.root, self._tar.name))
        scan = TarScan(self._tar, identity=identity)
        if damage:
            scan.bad.append(BadSource(place, self._tar.prefix, damage))
        elif not self._samples:
            scan.bad.append(BadSource(place, self._tar.prefix, "holds no samples"))
        for key, sample in sorted(self._samples.items(), key=lambda item: item[1].row):
            fault = sample.fault
            if sample.row < 0 and not fault:
                fault = f"has no image; it has {sample.first}"
            if fault:
                scan.bad.append(BadSource(f"{place}#{key}", f"{self._tar.prefix}/{key}", fault))
            else:
                scan.rows.append(sample.row)
                scan.keys.append(key)
                scan.labels.append(sample.label)
        return scan


def _split_name(name: str) -> tuple[str, str]:
    """Returns a member's key, which has no dots, and its extension."""
    key, extension = key_and_extension(name.removeprefix("./"))
    return key.replace(".", "_"), extension


class Skimmer(Reader):
    """A reader that passes over data without reading them where the stream can seek."""

    def skip(self, size: int) -> None:
        if not size or not self._stream.seekable():
            super().skip(size)
            return
        self._stream.seek(size - 1, os.SEEK_CUR)
        # Only reading shows whether the stream is so long.
        if not self._stream.read(1):
            raise TarError(f"cut short behind byte {self.position}")
        self.position += size


@contextlib.contextmanager
def _open(tar: Tar) -> Iterator[IO[bytes]]:
    """Yields the decompressed bytes of a tar. Raises OSError."""
    with contextlib.ExitStack() as stack:
        if tar.root == PIPE:
            process = subprocess.Popen(tar.name, shell=True, stdout=subprocess.PIPE)
            stream: Any = stack.enter_context(process).stdout
            stack.callback(stream.close)
        else:
            stream = stack.enter_context(open_store(tar.root).open(tar.name))
        if tar.size is not None:
            descriptor = stream.fileno()
            stream = io.BufferedReader(
                RangeReader(lambda offset, size: os.pread(descriptor, size, tar.start + offset), tar.size)
            )
        head = stream.peek(8)
        for magic, decompress in _DECOMPRESSORS.items():
            if head.startswith(magic):
                stream = stack.enter_context(decompress(stream))
        yield stream


def _open_with_arrow(kind: str) -> Callable[[Any], Any]:
    def decompress(stream: Any) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(stream), kind)

    return decompress


_DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_with_arrow("zstd"),
    b"\x04\x22\x4d\x18": _open_with_arrow("lz4"),
}
