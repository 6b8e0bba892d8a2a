"""Reads the samples of packed data sets: the binary index of each shard, and the bytes that it points to.

    ROOT/manifest.json              classes, shards with counts and digests, the data set's digest: see manifest.py
    ROOT/shard-000000.tar           an ordinary WebDataset shard
    ROOT/shard-000000.index.npy     one RECORD a sample, in the order of the tar

With the index, reading a sample is one `pread`; training never scans or extracts a tar. ROOT is a folder or a URL.

In an annotated data set the tar holds each image's annotation behind the image, and the index says where that lies:

    semantic    KEY.jpg, KEY.seg.png    a map of the image's size, 8 bits a pixel: 0 no label, 1 … K the classes in the
                                        manifest's order, 255 to be ignored
    objects     KEY.jpg, KEY.json       boxes and masks of single objects, see object_annotations.py

In an unlabelled one nothing follows the image.
"""

import functools
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards.image_header import read_size
from pipeline.shards.manifest import CONTENTS, MANIFEST, Annotations, Manifest, Shard, locate_tars, read_manifest
from pipeline.shards.picture_credits import ATTRIBUTION
from pipeline.shards.store import Cache, Store, StoreError
from pipeline.shards.tar import Reader, TarError, members

MAX_BYTES = 1 << 28
"""The limit for an encoded image or annotation, which is held in memory."""
MAX_PIXELS = 1 << 27
"""The limit for the pixels of an image, which every decoding thread holds at three bytes each. A larger image is taken
for a decompression bomb."""

RECORD = np.dtype(
    [
        # Where the image's tar header begins in the tar, headers with long names included.
        ("header", "<u8"),
        # Where the image's first byte lies in the tar.
        ("offset", "<u8"),
        # The size of the encoded image, in bytes.
        ("size", "<u4"),
        # The position of the class in the manifest's list.
        ("label", "<i4"),
        # Height and width in pixels, as stored: EXIF orientation is not applied.
        ("height", "<u2"),
        ("width", "<u2"),
        # The CRC-32 of the encoded image.
        ("crc32", "<u4"),
    ]
)

_NUM_FIELDS = len(RECORD.descr)

# The label of an annotated image is 0.
ANNOTATED_RECORD = np.dtype(
    [
        *RECORD.descr,
        # Where the annotation's first byte lies in the tar, behind the image.
        ("annotation_offset", "<u8"),
        # The size of the annotation, in bytes.
        ("annotation_size", "<u4"),
        ("annotation_crc32", "<u4"),
    ]
)


Records = npt.NDArray[np.void]
"""[n] of RECORD or ANNOTATED_RECORD."""
Int64Array = npt.NDArray[np.int64]


class CorruptSampleError(RuntimeError):
    """A sample's bytes are not those that were indexed, or cannot become an image."""


class SampleSource(Protocol):
    """What a feed reads samples from: a ShardSet, or images as they lie (loose_images.py)."""

    classes: list[str]
    annotations: Annotations | None
    shard_samples: Int64Array

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def records(self, shards: Int64Array, rows: Int64Array) -> Records: ...

    def read(self, shard: int, row: int) -> bytes: ...

    def read_annotation(self, shard: int, row: int) -> bytes: ...

    def key(self, shard: int, row: int) -> str: ...

    def url(self, shard: int) -> str: ...


class ShardSet:
    """Packed data sets, opened: one, or several end to end that have the same classes and kind of annotations.

    A shard is known by its number, a sample by its shard and its row there. Raises InputError for a manifest that
    cannot be read and for data sets whose classes or annotations differ.
    """

    def __init__(self, *roots: str | Path, cache: Cache | Callable[[], Cache] | None = None):
        self._stores = [Store(root, cache) for root in roots]
        self.manifests: list[Manifest] = list(map(read_manifest, roots, self._stores))
        self.classes = self.manifests[0].classes
        self.annotations: Annotations | None = self.manifests[0].annotations
        self._check_equal_classes()
        self._tars: list[Store] = []
        self._shards: list[tuple[int, Shard]] = []
        for source, (manifest, store) in enumerate(zip(self.manifests, self._stores, strict=True)):
            if manifest.tars:
                store = Store(locate_tars(manifest.tars, store), cache)
            self._tars.append(store)
            self._shards += [(source, shard) for shard in manifest.shards]
        samples = [shard.samples for _, shard in self._shards]
        self.shard_samples = np.array(samples, np.int64)
        # Indices are small (32 or 48 bytes a sample) but an epoch visits every shard; the bound keeps memory flat.
        self._index = functools.lru_cache(maxsize=1024)(self._read_index)

    def _check_equal_classes(self) -> None:
        # A store's own name for its root holds no credentials.
        first = self.root
        for store, manifest in zip(self._stores, self.manifests, strict=True):
            if manifest.annotations != self.annotations:
                raise InputError(
                    f"{store.root} has {CONTENTS[manifest.annotations]} and {first} {CONTENTS[self.annotations]}: "
                    "data sets that are read together are of one kind"
                )
            if manifest.classes != self.classes:
                raise InputError(
                    f"{store.root} and {first} have different classes, so their labels mean different things: "
                    "pack one of them again with --classes-from the other"
                )

    def __len__(self) -> int:
        return int(self.shard_samples.sum())

    @property
    def part_samples(self) -> list[Int64Array]:
        """The sample counts of the shards of each source data set, [shards] each."""
        ends = np.cumsum([len(manifest.shards) for manifest in self.manifests])
        return np.split(self.shard_samples, ends[:-1])

    @property
    def root(self) -> str:
        """The folder or URL of the first data set, without credentials."""
        return self._stores[0].root

    @property
    def is_remote(self) -> bool:
        return not all(store.is_local for store in self._tars)

    @property
    def digest(self) -> str:
        """The data set's digest; for several data sets, the digest of their digests in order."""
        digests = [manifest.digest for manifest in self.manifests]
        if len(digests) == 1:
            return digests[0]
        return fingerprint(digests)

    @property
    def attribution(self) -> str | None:
        """The credits that have to accompany the data set's pictures wherever they are shown; None without any."""
        credits = map(_read_attribution, self._stores)
        # Each text once: a mixture may hold two packings of one source.
        unique = dict.fromkeys(filter(None, credits))
        return "\n".join(unique) or None

    def check(self) -> None:
        """Compares every local shard's size with the manifest. Raises InputError.

        A copy that was cut short is so rejected before training starts. Remote shards are verified by their digest
        when they are fetched.
        """
        for source, shard in self._shards:
            store = self._tars[source]
            if not store.is_local:
                continue
            size = store.size(shard.tar.name)
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes"
                raise InputError(
                    f"{store.url(shard.tar.name)}: {problem}, but {MANIFEST} lists {shard.bytes} bytes: "
                    "copy the data set again or pack it again"
                )

    def url(self, shard: int) -> str:
        source, entry = self._shards[shard]
        return self._tars[source].url(entry.tar.name)

    def open(self, shard: int) -> BinaryIO:
        """Opens a shard's tar for reading in order, past the cache. Raises FileNotFoundError, or StoreError."""
        source, entry = self._shards[shard]
        return self._tars[source].open(entry.tar.name)

    @property
    def record(self) -> np.dtype[np.void]:
        """The type of the indices' records: RECORD, or ANNOTATED_RECORD for annotated data sets."""
        return record_of(self.annotations)

    def index(self, shard: int) -> Records:
        """Returns the records, [samples] of `record`, of one shard.

        Raises InputError, or StoreError where the index is remote.
        """
        return self._index(shard)

    def _read_index(self, shard: int) -> Records:
        source, entry = self._shards[shard]
        store = self._stores[source]
        try:
            data = store.load(entry.index)
        except (OSError, StoreError) as error:
            if not store.is_local:
                raise
            raise InputError(
                f"{store.url(entry.index.name)}: {error}; it was changed or belongs to another packing: "
                "copy or pack the data again"
            ) from error
        records = decode_records(data, self.record)
        problem = _check_records(records, entry, self.manifests[source].num_labels)
        if problem:
            raise InputError(f"{store.url(entry.index.name)}: its index is wrong: {problem}; index the data set again")
        return records

    def records(self, shards: Int64Array, rows: Int64Array) -> Records:
        """Returns the records, [n] of `record`, of samples given by shard number and row, both [n]."""
        records = np.empty(len(shards), self.record)
        for shard in np.unique(shards):
            chosen = shards == shard
            records[chosen] = self.index(int(shard))[rows[chosen]]
        return records

    def read(self, shard: int, row: int) -> bytes:
        """Returns the encoded image of a sample.

        Raises CorruptSampleError when its checksum differs from the index, at its origin as well, and StoreError
        when the origin cannot be reached.
        """
        fields = self.index(shard)[row].item()[:_NUM_FIELDS]
        _, offset, size, _, height, width, crc32 = fields
        data = self._read(shard, offset, size, crc32, "its")
        # The decoder must meet no surprises: DALI dies of an image that it cannot follow, see image_header.py.
        if read_size(data) != (height, width):
            raise CorruptSampleError(
                f"its header does not say {width} × {height} pixels, or is of a kind not fed: see verify --deep"
            )
        if height * width > MAX_PIXELS:
            raise CorruptSampleError(f"{width} × {height} pixels; the limit is {MAX_PIXELS}")
        return data

    def read_annotation(self, shard: int, row: int) -> bytes:
        """Returns the annotation of a sample of an annotated data set, as it is in the tar. Raises as `read` does."""
        assert self.record == ANNOTATED_RECORD
        fields = self.index(shard)[row].item()
        *_, height, width, _, offset, size, crc32 = fields
        data = self._read(shard, offset, size, crc32, "its annotation's")
        if self.annotations == "semantic" and read_size(data) != (height, width):
            raise CorruptSampleError(f"its map is no PNG of {width} × {height} pixels, as its image is")
        return data

    def _read(
        self,
        shard: int,
        offset: int,
        size: int,
        crc32: int,
        whose: str,
    ) -> bytes:
        source, entry = self._shards[shard]
        store = self._tars[source]
        data = store.pread(entry.tar, offset, size)
        if zlib.crc32(data) == crc32:
            return data
        # The cache or the network may be to blame, so the origin is asked once more.
        data = store.pread_origin(entry.tar, offset, size)
        if zlib.crc32(data) == crc32:
            return data
        raise CorruptSampleError(f"{whose} bytes do not match their checksum")

    def key(self, shard: int, row: int) -> str:
        """Returns the sample's name in its tar, for messages; "row N" where the tar is damaged or unreachable."""
        source, entry = self._shards[shard]
        record = self.index(shard)[row]
        start = int(record["header"])
        end = int(record["offset"])
        try:
            header = self._tars[source].pread(entry.tar, start, end - start)
            return key_in(header, row)
        except (StoreError, OSError):
            return f"row {row}"

    def prefetch(self, shards: Int64Array) -> None:
        """Starts to fetch remote shards that will be needed soon."""
        entries = [self._shards[shard] for shard in shards]
        for source, store in enumerate(self._tars):
            store.prefetch([shard.tar for owner, shard in entries if owner == source])

    def close(self) -> None:
        # A data set's tars may be in the store of its manifest.
        for store in {*self._stores, *self._tars}:
            store.close()


def _read_attribution(store: Store) -> str | None:
    try:
        return store.read(ATTRIBUTION).decode(errors="replace").strip()
    # Some stores answer that access is denied where the file is missing.
    except (OSError, StoreError):
        return None


def record_of(annotations: Annotations | None) -> np.dtype[np.void]:
    """Returns the type of the records of a data set whose annotations are of a kind."""
    return ANNOTATED_RECORD if annotations in ("semantic", "objects") else RECORD


def encode_records(records: Records) -> bytes:
    """Returns the .npy file of any records, [n]."""
    buffer = BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()


def decode_records(data: bytes, record: np.dtype[np.void]) -> Records:
    """Returns the records, [n] of `record`, of a .npy file; none where it does not hold what its header says."""
    nothing = np.empty(0, record)
    buffer = BytesIO(data)
    try:
        np.lib.format.read_magic(buffer)
        shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
        records = np.frombuffer(data, record, offset=buffer.tell())
    # The header is Python source text, and parsing that raises almost anything.
    except Exception:
        return nothing
    if dtype != record or shape != records.shape:
        return nothing
    return records


def _check_records(records: Records, shard: Shard, num_labels: int) -> str | None:
    """Returns what is impossible in an index, which may come from anybody; None for an index that can be used."""
    if len(records) != shard.samples:
        return f"it holds not {shard.samples} records"
    spans = [("offset", "size")]
    if records.dtype == ANNOTATED_RECORD:
        spans.append(("annotation_offset", "annotation_size"))
    # Of each sample: where its header begins, and where its image and annotation begin and end, in this order.
    columns = [records["header"]]
    for start, size in spans:
        columns += [records[start], records[start] + records[size]]
    offsets = np.stack(columns, axis=1)
    # An end that wraps around 2^64 has a beginning beyond the tar.
    if offsets.max() > shard.bytes:
        return f"samples beyond the {shard.bytes} bytes of its tar"
    steps = np.diff(offsets.ravel().astype(np.int64))
    if steps.min() < 0:
        return "samples overlap"
    # The last step of a sample leads to the next one, over padding and members that are not read.
    num_columns = len(columns)
    is_read = np.arange(len(steps)) % num_columns != num_columns - 1
    if steps[is_read].max() > MAX_BYTES:
        return f"an image, annotation or header of more than {MAX_BYTES:,} bytes"
    labels = records["label"]
    if labels.min() < 0 or labels.max() >= num_labels:
        return f"labels beyond the {num_labels} classes"
    pixels = records["height"].astype(np.int64) * records["width"]
    if pixels.min() < 1 or pixels.max() > MAX_PIXELS:
        return f"images of more than {MAX_PIXELS} pixels, or of none"
    return None


def key_in(header: bytes, row: int) -> str:
    """Returns the key in a sample's tar header; "row N" where that cannot be read."""
    try:
        member = next(members(Reader(BytesIO(header))))
    except (TarError, StopIteration):
        return f"row {row}"
    key, _ = key_and_extension(member.name)
    return key


def key_and_extension(name: str) -> tuple[str, str]:
    """Splits a member's name as WebDataset does: the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
