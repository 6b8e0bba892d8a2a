"""What is to be packed: every image with its key and class, in files of their own or inside containers.

images in files ──make_listing──────────┐
rows of containers ──list_containers────┴──▶ ImageListing: classes, entries, digest, what cannot be packed
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.bad_samples import BadSource
from pipeline.shards.labels import check_first, is_number
from pipeline.shards.manifest import Annotations
from pipeline.shards.spill import Container, Source
from pipeline.value_text import list_first


class ImageEntry(NamedTuple):
    """One image to pack. The names of its fields are part of the listing's digest, so they stay as they are."""

    key: str
    place: str
    """The path of the image's file; for a row of a Parquet file, file and row as messages name them."""
    label: int
    annotation: str | bytes | None = None
    """What is packed with the image in place of its label: the path of its map, or its encoded objects."""


@dataclasses.dataclass(frozen=True)
class ImageListing:
    classes: list[str]
    entries: list[ImageEntry]
    digest: str
    """The digest of the entries and of their files' sizes and times."""
    bad: list[BadSource]
    """Missing files, rows without a class, images without an annotation, and annotations without an image."""
    containers: list[Container] = dataclasses.field(default_factory=list)
    """The Parquet files or tars that the entries are rows of."""
    annotations: Annotations | None = None
    """The kind of the entries' annotations; None where entries have labels."""


class Rows(NamedTuple):
    """What a container holds."""

    source: Source
    rows: Iterable[tuple[int, str, str, str | None]]
    """Row, key, place and label; None for a row without a class."""
    identity: str
    """A text that changes with the container's contents, such as its size and time."""


def number_classes(
    labels: set[str],
    classes: list[str] | None,
    where: str,
) -> tuple[list[str], dict[str, int]]:
    """Returns the sorted class list, numbers sorted by their value, and the position of each label in it.

    `classes` fixes the list. Then a label is one of its names; or, where all labels are numbers and no name is one, a
    position in the list. Raises InputError for a label that is neither.
    """
    are_numbers = all(map(is_number, labels))
    if classes is None:
        classes = sorted(labels)
        if are_numbers:
            classes.sort(key=int)
    positions = {name: number for number, name in enumerate(classes)}
    if are_numbers and not any(map(is_number, classes)):
        numbers = {label: int(label) for label in labels}
        check_first(set(numbers.values()), len(classes), where)
        positions = {label: number for label, number in numbers.items() if number < len(classes)}
    unknown = sorted(labels - positions.keys())
    if unknown:
        raise InputError(
            f"{where}: labels {list_first(unknown)} are not among the {len(classes)} classes of --classes-from; "
            "rename them or pack the split that has them first"
        )
    return classes, positions


def list_containers(containers: list[Rows], classes: list[str] | None, where: str) -> ImageListing:
    """Returns the listing of images in files that can only be read in order. `classes` fixes the class list."""
    labels = {label for container in containers for *_, label in container.rows if label is not None}
    classes, positions = number_classes(labels, classes, where)
    entries = []
    bad = []
    chosen = []
    for container in containers:
        rows = []
        for row, key, place, label in container.rows:
            if label is None:
                bad.append(BadSource(place, key, "has no class"))
            else:
                rows.append(row)
                entries.append(ImageEntry(key, place, positions[label]))
        chosen.append(Container(container.source, np.array(rows, np.int64)))
    identities = [container.identity for container in containers]
    digest = _compute_digest(classes, identities, entries)
    return ImageListing(classes, entries, digest, bad, chosen)


def make_listing(
    classes: list[str],
    entries: list[ImageEntry],
    bad: Sequence[BadSource] = (),
    annotations: Annotations | None = None,
) -> ImageListing:
    """Returns the listing of images in files of their own, sorted by key.

    Images whose files are missing, and all but the first of several with one key, are added to the bad ones.
    """
    unique = []
    duplicates = []
    for entry in sorted(entries):
        if unique and unique[-1].key == entry.key:
            reason = (
                f"it and {unique[-1].place} would both be {entry.key!r} in the shards: rename or remove one of them"
            )
            duplicates.append(BadSource(entry.place, entry.key, reason))
        else:
            unique.append(entry)
    readable = []
    missing = []
    identities = []
    for entry in unique:
        try:
            identities.append(identify_file(entry.place))
            # A map is a file of its own; objects are encoded already.
            if isinstance(entry.annotation, str):
                identities.append(identify_file(entry.annotation))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            missing.append(BadSource(str(error.filename), entry.key, reason))
        else:
            readable.append(entry)
    digest = _compute_digest(classes, identities, readable)
    return ImageListing(
        classes,
        readable,
        digest,
        [*bad, *duplicates, *missing],
        annotations=annotations,
    )


def identify_file(path: str | Path) -> str:
    """Returns a text that changes with a file. Size and time stand for the contents, which would take hours to read.

    Raises OSError.
    """
    stat = os.stat(path)  # noqa: PTH116
    return repr((str(path), stat.st_size, stat.st_mtime_ns))


def _compute_digest(classes: list[str], identities: Iterable[str], entries: list[ImageEntry]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for identity in identities:
        digest.update(identity.encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def key_of(path: str) -> str:
    """Returns the key of a file from its path below the data set's folder."""
    folder, slash, name = path.rpartition("/")
    stem, _, _ = name.rpartition(".")
    # WebDataset ends a sample's key at the first dot of its name, so the key itself has none.
    return f"{folder}{slash}{stem or name}".replace(".", "_")
