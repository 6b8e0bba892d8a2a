"""Compares a data set with its manifest, byte for byte, and with `deep` decodes every image and annotation.

    shard ──read once, in order──▶ CRC-32 of each image and annotation, SHA-256 of the whole ──▶ faults

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
from pipeline.shards.index import ANNOTATED_RECORD, ShardSet, key_in
from pipeline.shards.manifest import Manifest
from pipeline.shards.object_annotations import BadObjectsError
from pipeline.shards.process_pool import advance, map_tasks
from pipeline.shards.store import Blob, Cache, StoreError
from pipeline.shards.tar import Reader, TarError


def verify(root: str | Path, *, deep: bool = False, workers: int = 1) -> list[SampleFault]:
    """Returns all faults of the shards below `root`, a folder or URL; an empty list for an intact data set.

    `deep` also decodes every image and annotation. Raises InputError when the manifest itself cannot be read.
    """
    # The files may have been replaced since an earlier call.
    _open_shards.cache_clear()
    # A cached copy says nothing about the origin. In an empty cache of no size nothing is cached.
    with tempfile.TemporaryDirectory() as cache:
        shards = _open_shards(str(root), cache)
        num_shards = len(shards.shard_samples)
        results = map_tasks(
            _verify_shard,
            ((str(root), cache, number, deep) for number in range(num_shards)),
            workers=min(workers, num_shards),
            total=len(shards),
            name="verifying",
        )
        return [fault for faults in results for fault in faults]


# A worker verifies many shards of one data set.
@functools.lru_cache(maxsize=1)
def _open_shards(root: str, cache: str) -> ShardSet:
    return ShardSet(root, cache=Cache(cache, 0))


def _verify_shard(task: tuple[str, str, int, bool]) -> list[SampleFault]:
    root, cache, number, deep = task
    shards = _open_shards(root, cache)
    manifest = shards.manifests[0]
    tar = manifest.shards[number].tar
    faults = []
    # Without its index a shard is still read for its digest.
    records = np.empty(0, shards.record)
    try:
        records = shards.index(number)
    except (InputError, StoreError, OSError) as error:
        faults.append(SampleFault(tar.name, None, str(error)))
    try:
        with shards.open(number) as stream:
            faults += _compare_tar(
                stream,
                records,
                tar,
                manifest,
                deep,
            )
    except (StoreError, OSError) as error:
        faults.append(SampleFault(tar.name, None, str(error)))
    return faults


def _compare_tar(
    stream: IO[bytes],
    records: npt.NDArray[np.void],
    tar: Blob,
    manifest: Manifest,
    deep: bool,
) -> Iterator[SampleFault]:
    reader = Reader(stream)
    is_damaged = False
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
        reason = _image_problem(data, record, deep)
        if annotation is not None and not reason:
            reason = _annotation_problem(annotation, record, manifest, deep)
        if reason:
            is_damaged = True
            yield SampleFault(tar.name, key_in(header, row), reason)
        advance()
    sha256 = reader.finish(tar.bytes)
    if reader.position != tar.bytes:
        yield SampleFault(tar.name, None, f"has {reader.position} bytes, but the manifest lists {tar.bytes}")
    # A damaged sample explains a wrong digest.
    elif sha256 != tar.sha256 and not is_damaged:
        reason = "differs from the manifest"
        if len(records):
            reason += ", but no image does: only headers, labels or padding"
        yield SampleFault(tar.name, None, reason)


def _image_problem(data: bytes, record: np.void, deep: bool) -> str | None:
    if zlib.crc32(data) != record["crc32"]:
        return "its image does not match its checksum"
    if not deep:
        return None
    try:
        _, height, width = images.check(data)
    except BadImageError as error:
        return str(error)
    if (height, width) != (record["height"], record["width"]):
        return f"has {width} × {height} pixels, but the index says {record['width']} × {record['height']}"
    return None


def _annotation_problem(
    data: bytes,
    record: np.void,
    manifest: Manifest,
    deep: bool,
) -> str | None:
    if zlib.crc32(data) != record["annotation_crc32"]:
        return "its annotation does not match its checksum"
    if not deep:
        return None
    find_problem = _map_problem if manifest.annotations == "semantic" else _objects_problem
    try:
        return find_problem(data, record, len(manifest.classes))
    except (BadImageError, BadObjectsError) as error:
        return f"its annotation: {error}"


def _map_problem(data: bytes, record: np.void, num_classes: int) -> str | None:
    labels = images.decode_map(data)
    problem = _size_problem("its map has", labels.shape, record)
    if problem:
        return problem
    problem = images.wrong_labels(labels, num_classes)
    return f"its map has {problem}" if problem else None


def _objects_problem(data: bytes, record: np.void, num_classes: int) -> str | None:
    annotated = object_annotations.decode(data, num_classes)
    size = annotated.height, annotated.width
    return _size_problem("its objects are in", size, record)


def _size_problem(whose: str, size: tuple[int, ...], record: np.void) -> str | None:
    if size == (record["height"], record["width"]):
        return None
    return f"{whose} {size[1]} × {size[0]} pixels, but its image {record['width']} × {record['height']}"
