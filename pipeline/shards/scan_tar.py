"""Scans a tar of another origin: which samples it holds, where they lie, and what is wrong with the rest.

    stream ──tar.members──▶ members ──same key, side by side──▶ samples ──▶ Scan: records, labels, faults

As in WebDataset, a sample consists of adjacent members with one key. Its image is the member with the extension jpg,
jpeg or png, in upper or lower case, or another that was named; its label is the .cls member or another, a field of a
JSON member, or the name of the folder, or it has none. Nothing is extracted, and no name in a tar is ever used as a
path.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from pipeline.shards import images
from pipeline.shards.bad_samples import SampleFault
from pipeline.shards.class_folders import is_system
from pipeline.shards.image_sources import EXTENSIONS
from pipeline.shards.images import BadImageError, Header
from pipeline.shards.index import RECORD, key_and_extension
from pipeline.shards.part_names import (
    MAX_LABEL_BYTES,
    NO_LABEL,
    USUAL,
    BadLabelError,
    PartNames,
    Use,
    guess_uses,
    read_folder,
    read_label,
)
from pipeline.shards.process_pool import advance
from pipeline.shards.tar import Member, Reader, TarError, members

IMAGE_PARTS = ("jpg", "jpeg", "png")
REPACK = "pack --tars takes it"
"""What ends the reasons of faults that packing has no difficulty with."""


@dataclasses.dataclass
class Scan:
    name: str
    """The path of the tar below the data set's root."""
    bytes: int
    sha256: str
    records: npt.NDArray[np.void]
    """The records, [samples] of RECORD, whose labels are positions in `labels`."""
    keys: list[str]
    labels: list[str]
    """The labels as they are in the tar: names, or numbers in decimal digits."""
    faults: list[SampleFault]
    num_parts: list[int] = dataclasses.field(default_factory=list)
    """The number of members of each sample, [samples]."""
    num_members: int = 0
    """The number of files in the tar."""
    num_ignored: int = 0
    """The number of files that belong to no sample: hidden files, system files, files without an extension."""

    def drop(self, reasons: dict[int, str]) -> None:
        """Removes samples, given by row, and reports them as faults."""
        for row, reason in reasons.items():
            self.faults.append(SampleFault(self.name, self.keys[row], reason))
        kept = [row for row in range(len(self.keys)) if row not in reasons]
        self.records = self.records[kept]
        self.keys = [self.keys[row] for row in kept]
        self.num_parts = [self.num_parts[row] for row in kept]


@dataclasses.dataclass
class Sample:
    key: str
    members: dict[str, Member] = dataclasses.field(default_factory=dict)
    """The members by their extension in lower case."""
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """The contents of the members that may be image or label, by extension."""
    names: PartNames = USUAL

    def part(self, extension: str) -> bytes:
        """Returns the contents of a member. Raises BadSampleError where there are none."""
        if extension not in self.members:
            raise BadSampleError(f"no .{extension} part; it has {', '.join(self.members)}")
        size = self.members[extension].size
        limit = _max_bytes(extension, self.names)
        if size > limit:
            raise BadSampleError(f"its {extension} part has {size:,} bytes; the limit is {limit:,}")
        if extension not in self.data:
            raise BadSampleError(f"its {extension} part is cut short")
        return self.data[extension]


class BadSampleError(ValueError):
    """This sample cannot be used. The message says why, without naming it."""


Row = tuple[int, int, int, int, int, int, int]
"""The fields of a RECORD."""

Look = Callable[[bytes], Header]
"""The function that checks an image: images.check, which decodes it, or images.header."""


def scan_tar(
    stream: IO[bytes],
    name: str,
    names: PartNames,
    look: Look,
) -> Scan:
    """Reads a tar from beginning to end. `names` says where images and labels are."""
    reader = Reader(stream)
    ignored: list[Member] = []
    labels: dict[str, int] = {}
    # For each key, in the order of the tar: the extensions of its members, and its row or what is wrong with it.
    entries: dict[str, tuple[set[str], Row | str]] = {}
    faults: list[SampleFault] = []
    num_members = 0
    try:
        for sample in samples(reader, ignored, names):
            advance(0)
            num_members += len(sample.members)
            extensions = {*sample.members}
            if sample.key not in entries:
                row = _make_row(sample, labels, look)
                entries[sample.key] = extensions, row
                continue
            earlier, _ = entries[sample.key]
            # Members that complete an earlier sample are its own, apart from it; others are a sample of their own.
            if extensions.isdisjoint(earlier):
                reason = f"its parts do not stand side by side; tar --sort=name writes them so, and {REPACK}"
                entries[sample.key] = extensions | earlier, reason
            else:
                faults.append(SampleFault(name, sample.key, "a second sample of this key"))
    except TarError as error:
        faults.append(SampleFault(name, None, str(error)))
    # The digest is of the whole file, damaged or not.
    sha256 = reader.finish()

    rows: dict[str, Row] = {}
    num_parts = []
    for key, (extensions, row) in entries.items():
        if isinstance(row, str):
            faults.append(SampleFault(name, key, row))
        else:
            rows[key] = row
            num_parts.append(len(extensions))
    strays = []
    for member in ignored:
        reason = _member_problem(member)
        if reason:
            strays.append(SampleFault(name, member.name, reason))
    if not entries and not faults and not strays:
        faults.append(SampleFault(name, None, "holds no samples"))
    return Scan(
        name=name,
        bytes=reader.position,
        sha256=sha256,
        records=np.array(list(rows.values()), RECORD),
        keys=list(rows),
        labels=list(labels),
        faults=faults + strays,
        num_parts=num_parts,
        num_members=num_members + len(ignored),
        num_ignored=len(ignored) - len(strays),
    )


def look_at_parts(stream: IO[bytes]) -> dict[str, Use]:
    """Returns what the parts of the first sample look like, by the name to give. Raises nothing for a damaged tar."""
    reader = Reader(stream)
    uses: dict[str, Use] = {}
    first = None
    with contextlib.suppress(TarError):
        for member in members(reader):
            key, extension = key_and_extension(member.name)
            if member.kind != "file" or is_system(member.name) or not extension:
                continue
            if key != (first or key):
                break
            first = key
            uses |= guess_uses(extension, reader.take(min(member.size, MAX_LABEL_BYTES)))
            if "/" in key.removeprefix("./"):
                uses["folder"] = "label"
    return uses


def samples(reader: Reader, ignored: list[Member], names: PartNames) -> Iterator[Sample]:
    """Yields the samples of a tar: adjacent members of one key. Files without key or extension go to `ignored`.

    Raises TarError where the rest of the tar cannot be read, after yielding the sample in which this happened.
    """
    sample = None
    try:
        for member in members(reader):
            key, extension = key_and_extension(member.name)
            if member.kind == "folder" and not leads_out(member.name):
                continue
            if is_system(member.name) or key.endswith("/") or not key or not extension:
                ignored.append(member)
                continue
            # A second member of one extension begins a new sample of the same key.
            if sample is None or key != sample.key or extension in sample.members:
                if sample is not None:
                    yield sample
                sample = Sample(key, names=names)
            sample.members[extension] = member
            if member.kind == "file" and member.size <= _max_bytes(extension, names):
                sample.data[extension] = reader.take(member.size)
    except TarError:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _max_bytes(extension: str, names: PartNames) -> int:
    """Returns the limit for a member that is read; -1 for members that are not read."""
    if extension in names.image_parts(IMAGE_PARTS):
        return images.MAX_BYTES
    return MAX_LABEL_BYTES if extension == names.label_part else -1


def _make_row(
    sample: Sample,
    labels: dict[str, int],
    look: Look,
) -> Row | str:
    """Returns the sample's record, or what is wrong with it. Adds its label to `labels`."""
    try:
        for extension, member in sample.members.items():
            reason = _member_problem(member)
            if reason:
                raise BadSampleError(f"its {extension} part {reason}")
        parts = sample.names.image_parts(IMAGE_PARTS)
        extensions = [extension for extension in sample.members if extension in parts]
        if len(extensions) != 1:
            count = "more than one" if extensions else "no"
            called = " or ".join(parts).replace(" or ", ", ", len(parts) - 2)
            remedy = f"; {REPACK}" if not extensions and sample.members.keys() & set(EXTENSIONS) else ""
            raise BadSampleError(f"{count} part called {called}; it has {', '.join(sample.members)}{remedy}")
        data = sample.part(extensions[0])
        head = look(data)
        # After the image: a rejected sample adds no label.
        label = labels.setdefault(_read_label(sample), len(labels))
    except (BadSampleError, BadLabelError, BadImageError) as error:
        return str(error)
    image = sample.members[extensions[0]]
    return (
        image.header,
        image.offset,
        image.size,
        label,
        head.height,
        head.width,
        zlib.crc32(data),
    )


def _read_label(sample: Sample) -> str:
    source = sample.names.label or "cls"
    if source == NO_LABEL:
        return ""
    if source == "folder":
        return read_folder(sample.key)
    return read_label(sample.part(sample.names.label_part), source)


def _member_problem(member: Member) -> str | None:
    if leads_out(member.name):
        return f"has the name {member.name!r}, which leads out of the tar"
    if member.kind in ("file", "folder"):
        return None
    problems = {"link": f"is a link; {REPACK}", "sparse": f"is a sparse file; {REPACK}"}
    return problems.get(member.kind, "is no ordinary file")


def leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name
