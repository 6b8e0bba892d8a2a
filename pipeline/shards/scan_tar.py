"""One tar that somebody else made: which samples it holds, where they lie, and what is wrong with the rest.

    stream ──tar.members──▶ members ──same key, side by side──▶ samples ──▶ Scan: records, labels, faults

As in WebDataset a sample is what stands side by side under one key. Its image is the part called jpg, jpeg or png, in
any case; its label is the .cls part, a field of the .json part, or the name of the folder. Nothing is extracted, and
no name in a tar ever meets the file system.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from pipeline.shards import images
from pipeline.shards.bad_samples import SampleFault
from pipeline.shards.class_folders import is_system
from pipeline.shards.images import BadImageError, Header
from pipeline.shards.index import RECORD, key_and_extension
from pipeline.shards.labels import are_several
from pipeline.shards.process_pool import advance
from pipeline.shards.tar import Member, Reader, TarError, members

MAX_LABEL_LENGTH = 1000
MAX_LABEL_BYTES = 1 << 22
"""Of a part that holds the label."""

IMAGE_PARTS = ("jpg", "jpeg", "png")
LABEL_PARTS = ("cls", "json")


@dataclasses.dataclass
class Scan:
    name: str
    """Of the tar, below the data set's root."""
    bytes: int
    sha256: str
    records: npt.NDArray[np.void]
    """[samples] of RECORD, whose labels are positions in `labels`."""
    keys: list[str]
    labels: list[str]
    """As they stand in the tar: names, or numbers in decimal digits."""
    faults: list[SampleFault]
    num_parts: list[int] = dataclasses.field(default_factory=list)
    """[samples] files of each."""
    num_members: int = 0
    """Files in the tar."""
    num_ignored: int = 0
    """Files that belong to no sample: hidden, of a system, or without an extension."""

    def drop(self, reasons: dict[int, str]) -> None:
        """Turn rows into faults."""
        self.faults += [SampleFault(self.name, self.keys[row], reason) for row, reason in reasons.items()]
        self.records = np.delete(self.records, list(reasons))
        self.keys = [key for row, key in enumerate(self.keys) if row not in reasons]
        self.num_parts = [count for row, count in enumerate(self.num_parts) if row not in reasons]


@dataclasses.dataclass
class Sample:
    key: str
    members: dict[str, Member] = dataclasses.field(default_factory=dict)
    """By extension, in lower case."""
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Of image and label, by extension."""

    def part(self, extension: str) -> bytes:
        """Raises BadSampleError."""
        if extension not in self.members:
            raise BadSampleError(f"no .{extension} part; it has {', '.join(self.members)}")
        size, limit = self.members[extension].size, _most_bytes(extension)
        if size > limit:
            raise BadSampleError(f"its {extension} part has {size:,} bytes; the limit is {limit:,}")
        if extension not in self.data:
            raise BadSampleError(f"its {extension} part is cut short")
        return self.data[extension]


class BadSampleError(ValueError):
    """This sample cannot be used. The message says why, without naming it."""


Row = tuple[int, int, int, int, int, int, int]  # the fields of a RECORD


def scan_tar(stream: IO[bytes], name: str, source: str, look: Callable[[bytes], Header]) -> Scan:
    """Read a tar from beginning to end. `source` of the labels is cls, folder or json:FIELD; `look` at an image is
    images.check, which decodes it, or images.header."""
    reader = Reader(stream)
    ignored: list[Member] = []
    labels: dict[str, int] = {}
    # Of each key, in the order of the tar: its parts, and its row or what is wrong with it.
    found: dict[str, tuple[set[str], Row | str]] = {}
    faults: list[SampleFault] = []
    num_members = 0
    try:
        for sample in samples(reader, ignored):
            advance(0)
            num_members += len(sample.members)
            parts = sample.members.keys()
            if sample.key not in found:
                found[sample.key] = {*parts}, _row(sample, source, labels, look)
            elif parts.isdisjoint(found[sample.key][0]):
                found[sample.key] = (
                    {*parts, *found[sample.key][0]},
                    "its parts do not stand side by side; tar --sort=name writes them so",
                )
            else:
                faults.append(SampleFault(name, sample.key, "a second sample of this key"))
    except TarError as error:
        faults.append(SampleFault(name, None, str(error)))
    sha256 = reader.finish()

    faults += [SampleFault(name, key, row) for key, (_, row) in found.items() if isinstance(row, str)]
    strays = [SampleFault(name, member.name, reason) for member in ignored if (reason := _reason_to_refuse(member))]
    rows = {key: row for key, (_, row) in found.items() if not isinstance(row, str)}
    if not found and not faults and not strays:
        faults.append(SampleFault(name, None, "holds no samples"))
    return Scan(
        name=name,
        bytes=reader.position,
        sha256=sha256,
        records=np.array(list(rows.values()), RECORD),
        keys=list(rows),
        labels=list(labels),
        faults=faults + strays,
        num_parts=[len(found[key][0]) for key in rows],
        num_members=num_members + len(ignored),
        num_ignored=len(ignored) - len(strays),
    )


def samples(reader: Reader, ignored: list[Member]) -> Iterator[Sample]:
    """Members of one key that stand side by side. What is hidden or has no extension goes to `ignored`.

    Raises TarError where the tar cannot be read on, after the sample that this happened in.
    """
    sample = None
    try:
        for member in members(reader):
            key, extension = key_and_extension(member.name)
            if member.kind == "folder" and not _leads_out(member.name):
                continue
            if is_system(member.name) or key.endswith("/") or not key or not extension:
                ignored.append(member)
                continue
            if sample is None or key != sample.key or extension in sample.members:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            sample.members[extension] = member
            if member.kind == "file" and member.size <= _most_bytes(extension):
                sample.data[extension] = reader.take(member.size)
    except TarError:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _most_bytes(extension: str) -> int:
    """Of a part that is read."""
    return images.MAX_BYTES if extension in IMAGE_PARTS else MAX_LABEL_BYTES if extension in LABEL_PARTS else -1


def _row(sample: Sample, source: str, labels: dict[str, int], look: Callable[[bytes], Header]) -> Row | str:
    """The sample's record, or what is wrong with it. Adds its label to `labels`."""
    try:
        for extension, member in sample.members.items():
            if reason := _reason_to_refuse(member):
                raise BadSampleError(f"its {extension} part {reason}")
        image = [extension for extension in sample.members if extension in IMAGE_PARTS]
        if len(image) != 1:
            count = "more than one" if image else "no"
            raise BadSampleError(f"{count} part called jpg, jpeg or png; it has {', '.join(sample.members)}")
        data = sample.part(image[0])
        head = look(data)
        label = labels.setdefault(_label(sample, source), len(labels))
    except (BadSampleError, BadImageError) as error:
        return str(error)
    place = sample.members[image[0]]
    return place.header, place.offset, place.size, label, head.height, head.width, zlib.crc32(data)


def _label(sample: Sample, source: str) -> str:
    part, _, field = source.partition(":")
    if part == "folder":
        folder = sample.key.rpartition("/")[0].rpartition("/")[2]
        if folder in ("", "."):
            raise BadSampleError("lies in no folder, from which its class could be taken")
        label = folder
    elif part == "json":
        label = _field(sample.part("json"), field)
    else:
        label = sample.part("cls").decode("utf-8", "replace").strip()
    if not label.isprintable() or not 0 < len(label) <= MAX_LABEL_LENGTH or "\ufffd" in label:
        raise BadSampleError(f"label {label[:40]!r}: neither a number nor a readable name")
    if part != "folder" and are_several(label):
        raise BadSampleError(f"label {label[:40]!r} is several numbers; a sample has one class")
    return label


def _field(data: bytes, field: str) -> str:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"its json part is not JSON: {error}") from error
    if not isinstance(tree, dict) or field not in tree:
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise BadSampleError(f"its json part has no field {field!r}; found {found[:200]}")
    value = tree[field]
    if isinstance(value, float) and value.is_integer():  # a column that had gaps on its way through pandas
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadSampleError(f"{field} is {json.dumps(value)[:40]}; a label is a number or a name")
    return str(value).strip()


def _reason_to_refuse(member: Member) -> str | None:
    if _leads_out(member.name):
        return f"has the name {member.name!r}, which leads out of the tar"
    if member.kind not in ("file", "folder"):
        return {"link": "is a link", "sparse": "is a sparse file"}.get(member.kind, "is no ordinary file")
    return None


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name
