"""Compare a data set with its manifest, byte for byte, and with `deep` decode every image and annotation.

    shard ──read once, in order──▶ CRC-32 of each part of a sample, SHA-256 of the whole ──▶ faults

A missing or unreadable shard is a fault like others.
"""

import functools
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.shards import images, object_annotations
from pipeline.shards.bad_samples import SampleFault
from pipeline.shards.images import BadImageError
from pipeline.shards.index import ANNOTATED_RECORD, Manifest, ShardSet, key_in
from pipeline.shards.object_annotations import BadObjectsError
from pipeline.shards.process_pool import advance, each
from pipeline.shards.store import Blob, Cache, StoreError
from pipeline.shards.tar import Reader, TarError


def verify(root: str | Path, *, deep: bool = False, workers: int = 1) -> list[SampleFault]:
    """Everything that is wrong with the shards below `root`, a folder or URL; empty when all is well.

    `deep` also decodes every image and annotation. Raises InputError when the manifest itself cannot be read.
    """
    _open.cache_clear()  # of an earlier call, since which the files may have been replaced
    # What is cached says nothing about the origin, so indices come from there: an empty cache without room for them.
    with tempfile.TemporaryDirectory() as cache:
        shards = _open(str(root), cache)
        num_shards = len(shards.shard_samples)
        tasks = ((str(root), cache, number, deep) for number in range(num_shards))
        results = each(_verify_shard, tasks, workers=min(workers, num_shards), total=len(shards), name="verifying")
        return [fault for faults in results for fault in faults]


@functools.lru_cache(maxsize=1)
def _open(root: str, cache: str) -> ShardSet:
    return ShardSet(root, cache=Cache(cache, 0))


def _verify_shard(task: tuple[str, str, int, bool]) -> list[SampleFault]:
    root, cache, number, deep = task
    shards = _open(root, cache)
    manifest = shards.manifests[0]
    tar = manifest.shards[number].tar
    faults, records = [], np.empty(0, shards.record)
    try:
        records = shards.index(number)
    except (InputError, StoreError, OSError) as error:
        faults.append(SampleFault(tar.name, None, str(error)))
    try:
        with shards.open(number) as stream:
            faults += _compare(stream, records, tar, manifest, deep)
    except (StoreError, OSError) as error:
        faults.append(SampleFault(tar.name, None, str(error)))
    return faults


def _compare(
    stream: IO[bytes], records: npt.NDArray[np.void], tar: Blob, manifest: Manifest, deep: bool
) -> Iterator[SampleFault]:
    reader, is_damaged = Reader(stream), False
    for row, record in enumerate(records):
        try:
            reader.skip(int(record["header"]) - reader.position)
            header = reader.take(int(record["offset"]) - reader.position)
            data = reader.take(int(record["size"]))
            annotation = None
            if records.dtype == ANNOTATED_RECORD:
                reader.skip(int(record["annotation_offset"]) - reader.position)
                annotation = reader.take(int(record["annotation_size"]))
        except TarError as error:
            yield SampleFault(tar.name, None, f"{error}: the last {len(records) - row} samples are lost")
            break
        reason = _wrong_image(data, record, deep)
        if annotation is not None and not reason:
            reason = _wrong_annotation(annotation, record, manifest, deep)
        if reason:
            is_damaged = True
            yield SampleFault(tar.name, key_in(header, row), reason)
        advance()
    sha256 = reader.finish(tar.bytes)
    if reader.position != tar.bytes:
        yield SampleFault(tar.name, None, f"has {reader.position} bytes, but the manifest lists {tar.bytes}")
    elif sha256 != tar.sha256 and not is_damaged:
        which = ", but no image does: only headers, labels or padding" if len(records) else ""
        yield SampleFault(tar.name, None, f"differs from the manifest{which}")


def _wrong_image(data: bytes, record: np.void, deep: bool) -> str | None:
    if zlib.crc32(data) != record["crc32"]:
        return "its image does not match its checksum"
    if deep:
        try:
            _, height, width = images.check(data)
        except BadImageError as error:
            return str(error)
        if (height, width) != (record["height"], record["width"]):
            return f"has {width} × {height} pixels, but the index says {record['width']} × {record['height']}"
    return None


def _wrong_annotation(data: bytes, record: np.void, manifest: Manifest, deep: bool) -> str | None:
    if zlib.crc32(data) != record["annotation_crc32"]:
        return "its annotation does not match its checksum"
    if not deep:
        return None
    wrong_kind = _wrong_map if manifest.annotations == "semantic" else _wrong_objects
    try:
        return wrong_kind(data, record, len(manifest.classes))
    except (BadImageError, BadObjectsError) as error:
        return f"its annotation: {error}"


def _wrong_map(data: bytes, record: np.void, num_classes: int) -> str | None:
    labels = images.decode_map(data)
    if wrong := _wrong_size("its map has", labels.shape, record):
        return wrong
    wrong = images.wrong_labels(labels, num_classes)
    return f"its map has {wrong}" if wrong else None


def _wrong_objects(data: bytes, record: np.void, num_classes: int) -> str | None:
    found = object_annotations.decode(data, num_classes)
    return _wrong_size("its objects are in", (found.height, found.width), record)


def _wrong_size(whose: str, size: tuple[int, ...], record: np.void) -> str | None:
    if size == (record["height"], record["width"]):
        return None
    return f"{whose} {size[1]} × {size[0]} pixels, but its image {record['width']} × {record['height']}"
