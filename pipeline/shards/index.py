"""What lies where: the manifest of a data set, the binary index of each shard, and reading a sample's bytes.

    ROOT/manifest.json              classes, shards with counts and digests, the data set's digest
    ROOT/shard-000000.tar           an ordinary WebDataset shard
    ROOT/shard-000000.index.npy     one RECORD a sample, in the order of the tar

With the index a sample is one `pread`; nothing ever scans or extracts a tar in training. ROOT is a folder or a URL.

In an annotated data set the tar holds behind each image what is to be learnt of it, and the index a second place:

    semantic    KEY.jpg, KEY.seg.png    a map of the image's size, 8 bits a pixel: 0 no label, 1 … K the classes in the
                                        manifest's order, 255 to be ignored
    objects     KEY.jpg, KEY.json       boxes and masks of single objects, see objects.py
"""

import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from pipeline import files, json_text
from pipeline.config import fingerprint, validated
from pipeline.errors import InputError
from pipeline.shards.filesystems import below_root, is_http, sha256_hex
from pipeline.shards.image_header import read_size
from pipeline.shards.picture_credits import ATTRIBUTION
from pipeline.shards.store import Blob, Cache, Store, StoreError
from pipeline.shards.tar import Reader, TarError, members

MANIFEST = "manifest.json"
TARS_QUERY = "tars.query"
"""Beside the manifest, readable by its owner alone: the query that signs the tars' URLs, and is part of no manifest."""
FORMAT = 2
MAX_MANIFEST_BYTES = 64 << 20
"""Of some 250,000 shards."""
MAX_BYTES = 1 << 28
"""Of an encoded image or annotation, which is held in memory."""
MAX_PIXELS = 1 << 27
"""Most pixels of an image. A larger one is taken for a decompression bomb: three bytes a pixel, in every thread."""
MAX_CLASSES = 1 << 20
"""A larger label number is taken for a mistake rather than for a class list of that length."""

RECORD = np.dtype(
    [
        ("header", "<u8"),  # where the image's tar header begins, long-name headers included
        ("offset", "<u8"),  # of the image's first byte in the tar
        ("size", "<u4"),  # of the encoded image, in bytes
        ("label", "<i4"),  # position of the class in the manifest's list
        ("height", "<u2"),  # in pixels, as stored (EXIF orientation not applied)
        ("width", "<u2"),
        ("crc32", "<u4"),  # of the encoded image
    ]
)

_NUM_FIELDS = len(RECORD.descr)

ANNOTATED_RECORD = np.dtype(
    [
        *RECORD.descr,  # the label is 0
        ("annotation_offset", "<u8"),  # of its first byte in the tar, behind the image
        ("annotation_size", "<u4"),  # in bytes
        ("annotation_crc32", "<u4"),
    ]
)

Annotations = Literal["semantic", "objects"]
"""What is to be learnt of an image other than its class."""

EXTENSIONS: dict[Annotations | None, str] = {None: "cls", "semantic": "seg.png", "objects": "json"}
"""Of the member behind each image's: its class where there are no annotations."""


class CorruptSampleError(RuntimeError):
    """A sample's bytes are not those that were indexed, or cannot become an image."""


# A dataclass with slots, because a large data set has 10^5 of them.
@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Shard:
    name: Annotated[str, AfterValidator(below_root)]
    """Path below the root, without .tar."""
    samples: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, AfterValidator(sha256_hex)]
    index_bytes: Annotated[int, Field(ge=0, le=1 << 30)]
    index_sha256: Annotated[str, AfterValidator(sha256_hex)]

    @property
    def tar(self) -> Blob:
        return Blob(f"{self.name}.tar", self.bytes, self.sha256)

    @property
    def index(self) -> Blob:
        return Blob(f"{self.name}.index.npy", self.index_bytes, self.index_sha256)


def _this_format(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"format {number}, but this version reads format {FORMAT}")
    return number


def _class_list(names: list[str]) -> list[str]:
    if wrong := next((name for name in names if not name.isprintable()), None):
        raise ValueError(f"{wrong[:100]!r} is no class name: control characters are refused")
    if len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise ValueError(f"expected at most {MAX_CLASSES} names, each once")
    return names


class Manifest(BaseModel):
    """A data set: its classes and shards. `digest` covers both, so two data sets with equal digests are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Annotated[int, AfterValidator(_this_format)]
    classes: Annotated[list[str], FailFast(), AfterValidator(_class_list)]
    shards: Annotated[list[Shard], FailFast(), Field(min_length=1)]
    samples: int
    digest: str
    tars: str | None = None
    """Folder or URL of the tars where they do not lie beside the manifest."""
    annotations: Annotations | None = None
    """None: each image has a class, its label."""

    @classmethod
    def of(
        cls,
        classes: list[str],
        shards: list[Shard],
        tars: str | None = None,
        annotations: Annotations | None = None,
    ) -> "Manifest":
        return cls(
            format=FORMAT,
            classes=classes,
            shards=shards,
            samples=sum(shard.samples for shard in shards),
            digest=_digest(classes, shards, annotations),
            tars=tars,
            annotations=annotations,
        )

    def encode(self) -> bytes:
        """The text of manifest.json."""
        # Of labelled images as it was before there were annotations.
        left_out = None if self.annotations else {"annotations"}
        return (self.model_dump_json(indent=1, exclude=left_out) + "\n").encode()


def _digest(classes: list[str], shards: list[Shard], annotations: Annotations | None) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    if annotations:
        digest.update(f"\n{annotations}".encode())
    for shard in shards:
        fields = shard.name, shard.samples, shard.bytes, shard.sha256, shard.index_bytes, shard.index_sha256
        digest.update("\n{} {} {} {} {} {}".format(*fields).encode())
    return digest.hexdigest()


def read_manifest(root: str | Path, store: Store | None = None) -> Manifest:
    """Read and check ROOT/manifest.json. Raises InputError where it is missing, broken, or disagrees with itself."""
    store = store or Store(root)
    path = store.url(MANIFEST)
    try:
        data = store.read(MANIFEST, MAX_MANIFEST_BYTES)
    except (OSError, StoreError) as error:
        if isinstance(error, StoreError) and not store.is_local:
            raise
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, StoreError) else error.strerror or error
        raise InputError(f"{path}: cannot read the manifest: {reason}; make one with launch/shards.py") from error
    try:
        manifest = validated(Manifest, json_text.read(data, path), path)
    except InputError as error:
        raise InputError(f"{error}; copy or pack the data again") from None
    if manifest.samples != sum(s.samples for s in manifest.shards) or manifest.digest != _digest(
        manifest.classes, manifest.shards, manifest.annotations
    ):
        raise InputError(f"{path}: its digest and counts do not match its contents: it was edited; pack the data again")
    return manifest


def _attribution(store: Store) -> str | None:
    try:
        return store.read(ATTRIBUTION).decode(errors="replace").strip()
    except (OSError, StoreError):  # some stores say that it is forbidden where it is missing
        return None


def _signed(tars: str, store: Store) -> str:
    """Where the tars are, with the query that signs their URLs if they need one."""
    path = Path(store.root) / TARS_QUERY
    if not (is_http(tars) and store.is_local and path.exists()):
        return tars
    try:
        return f"{tars}?{files.read(path).decode().strip().removeprefix('?')}"
    except OSError as error:
        remedy = "ask its owner for a copy, or index the tars into a folder of your own"
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from error


class ShardSet:
    """Packed data sets, opened: one, or several end to end that have the same classes and kind of annotations.

    A shard is known by its number, a sample by its shard and its row there. Raises InputError for a manifest that
    cannot be read and for data sets whose classes or annotations differ.
    """

    def __init__(self, *roots: str | Path, cache: Cache | Callable[[], Cache] | None = None):
        self._stores = [Store(root, cache) for root in roots]
        self.manifests = [read_manifest(root, store) for root, store in zip(roots, self._stores, strict=True)]
        self.classes = self.manifests[0].classes
        self.annotations = self.manifests[0].annotations
        names = [store.root for store in self._stores]  # without secrets
        for name, manifest in zip(names, self.manifests, strict=True):
            if manifest.classes != self.classes:
                raise InputError(
                    f"{name} and {names[0]} have different classes, so their labels mean different things: "
                    "pack one of them again with --classes-from the other"
                )
            if manifest.annotations != self.annotations:
                raise InputError(
                    f"{name} has {_named(manifest.annotations)} and {names[0]} {_named(self.annotations)}: "
                    "data sets that are read together are of one kind"
                )
        self._tars = [
            Store(_signed(manifest.tars, store), cache) if manifest.tars else store
            for manifest, store in zip(self.manifests, self._stores, strict=True)
        ]
        self._shards = [(part, shard) for part, manifest in enumerate(self.manifests) for shard in manifest.shards]
        self.shard_samples = np.array([shard.samples for _, shard in self._shards], np.int64)
        # Indices are small (32 or 48 bytes a sample) but an epoch visits every shard; the bound keeps memory flat.
        self._index = functools.lru_cache(maxsize=1024)(self._read_index)

    def __len__(self) -> int:
        return int(self.shard_samples.sum())

    @property
    def part_samples(self) -> list[npt.NDArray[np.int64]]:
        """The sample counts of each data set's shards."""
        ends = np.cumsum([len(manifest.shards) for manifest in self.manifests])
        return np.split(self.shard_samples, ends[:-1])

    @property
    def is_remote(self) -> bool:
        return not all(store.is_local for store in self._tars)

    @property
    def digest(self) -> str:
        """Of the data set; of several, of their digests in order."""
        digests = [manifest.digest for manifest in self.manifests]
        return digests[0] if len(digests) == 1 else fingerprint(digests)

    @property
    def attribution(self) -> str | None:
        """What has to be said wherever its pictures are shown, if anything has."""
        return "\n".join(dict.fromkeys(filter(None, map(_attribution, self._stores)))) or None

    def check(self) -> None:
        """Compare every local shard's size with the manifest. Raises InputError.

        So that a copy that was cut short is refused before training starts. Of remote shards the digest is compared
        when they are fetched.
        """
        for part, shard in self._shards:
            store = self._tars[part]
            if store.is_local and (size := store.size(shard.tar.name)) != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(
                    f"{store.url(shard.tar.name)}: {found}, but {MANIFEST} lists {shard.bytes} bytes: "
                    "copy the data set again or pack it again"
                )

    def url(self, shard: int) -> str:
        part, entry = self._shards[shard]
        return self._tars[part].url(entry.tar.name)

    def open(self, shard: int) -> BinaryIO:
        """A shard's tar, to be read in order, past the cache. Raises FileNotFoundError, or StoreError."""
        part, entry = self._shards[shard]
        return self._tars[part].open(entry.tar.name)

    @property
    def record(self) -> np.dtype[np.void]:
        """RECORD, or ANNOTATED_RECORD of annotated data sets."""
        return ANNOTATED_RECORD if self.annotations else RECORD

    def index(self, shard: int) -> npt.NDArray[np.void]:
        """The records, [samples] of `record`, of one shard. Raises InputError, or StoreError where it is remote."""
        return self._index(shard)

    def _read_index(self, shard: int) -> npt.NDArray[np.void]:
        part, entry = self._shards[shard]
        store = self._stores[part]
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
        if wrong := _wrong_records(records, entry, len(self.classes)):
            raise InputError(f"{store.url(entry.index.name)}: its index is wrong: {wrong}; index the data set again")
        return records

    def records(self, shards: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """The records, [n] of `record`, of samples given by shard number and row, both [n]."""
        records = np.empty(len(shards), self.record)
        for shard in np.unique(shards):
            chosen = shards == shard
            records[chosen] = self.index(int(shard))[rows[chosen]]
        return records

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of a sample.

        Raises CorruptSampleError when its checksum differs from the index, at its origin as well, and StoreError
        when the origin cannot be reached.
        """
        _, offset, size, _, height, width, crc32 = self.index(shard)[row].item()[:_NUM_FIELDS]
        data = self._read(shard, offset, size, crc32, "its")
        if read_size(data) != (height, width):
            raise CorruptSampleError(
                f"its header does not say {width} × {height} pixels, or is of a kind not fed: see verify --deep"
            )
        if height * width > MAX_PIXELS:
            raise CorruptSampleError(f"{width} × {height} pixels; the limit is {MAX_PIXELS}")
        return data

    def read_annotation(self, shard: int, row: int) -> bytes:
        """The annotation of a sample of an annotated data set, as it is in the tar. Raises as `read` does."""
        assert self.annotations
        *_, height, width, _, offset, size, crc32 = self.index(shard)[row].item()
        data = self._read(shard, offset, size, crc32, "its annotation's")
        if self.annotations == "semantic" and read_size(data) != (height, width):
            raise CorruptSampleError(f"its map is no PNG of {width} × {height} pixels, as its image is")
        return data

    def _read(self, shard: int, offset: int, size: int, crc32: int, whose: str) -> bytes:
        part, entry = self._shards[shard]
        data = self._tars[part].pread(entry.tar, offset, size)
        if zlib.crc32(data) != crc32:
            # The cache or the wire may be to blame.
            data = self._tars[part].pread_origin(entry.tar, offset, size)
            if zlib.crc32(data) != crc32:
                raise CorruptSampleError(f"{whose} bytes do not match their checksum")
        return data

    def key(self, shard: int, row: int) -> str:
        """The sample's name in its tar, for messages; "row N" where the tar is damaged or out of reach."""
        part, entry = self._shards[shard]
        record = self.index(shard)[row]
        start, end = int(record["header"]), int(record["offset"])
        try:
            return key_in(self._tars[part].pread(entry.tar, start, end - start), row)
        except (StoreError, OSError):
            return f"row {row}"

    def prefetch(self, shards: npt.NDArray[np.int64]) -> None:
        """Start fetching remote shards that will be needed soon."""
        for part, store in enumerate(self._tars):
            store.prefetch([self._shards[shard][1].tar for shard in shards if self._shards[shard][0] == part])

    def close(self) -> None:
        for store in {*self._stores, *self._tars}:
            store.close()


def decode_records(data: bytes, record: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """Returns the records, [n] of `record`, of a .npy file; none where it does not hold what its header says."""
    buffer = BytesIO(data)
    try:
        np.lib.format.read_magic(buffer)
        shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
        records = np.frombuffer(data, record, offset=buffer.tell())
    except Exception:  # the header is Python's text, of which parsing raises almost anything
        return np.empty(0, record)
    return records if dtype == record and shape == records.shape else np.empty(0, record)


def _wrong_records(records: npt.NDArray[np.void], shard: Shard, num_classes: int) -> str | None:
    """Returns what an index says that cannot be, whoever made it; None for an index that can be used."""
    if len(records) != shard.samples:
        return f"it holds not {shard.samples} records"
    parts = [("offset", "size"), ("annotation_offset", "annotation_size")]
    parts = parts[: 2 if records.dtype == ANNOTATED_RECORD else 1]
    edges = [(records[start], records[start] + records[size]) for start, size in parts]
    places = np.stack([records["header"], *itertools.chain(*edges)], axis=1)
    if places.max() > shard.bytes:  # what wraps around has begun beyond it
        return f"samples beyond the {shard.bytes} bytes of its tar"
    steps = np.diff(places.ravel().astype(np.int64))
    if steps.min() < 0:
        return "samples overlap"
    if max(steps[part :: places.shape[1]].max() for part in range(places.shape[1] - 1)) > MAX_BYTES:
        return f"an image, annotation or header of more than {MAX_BYTES:,} bytes"
    if records["label"].min() < 0 or records["label"].max() >= num_classes:
        return f"labels beyond the {num_classes} classes"
    pixels = records["height"].astype(np.int64) * records["width"]
    if pixels.min() < 1 or pixels.max() > MAX_PIXELS:
        return f"images of more than {MAX_PIXELS} pixels, or of none"
    return None


def _named(annotations: Annotations | None) -> str:
    return f"{annotations} annotations" if annotations else "labelled images"


def key_in(header: bytes, row: int) -> str:
    """Returns the key in a sample's tar header; "row N" where that cannot be read."""
    try:
        return key_and_extension(next(members(Reader(BytesIO(header)))).name)[0]
    except (TarError, StopIteration):
        return f"row {row}"


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
