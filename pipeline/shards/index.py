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
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards.attribution import ATTRIBUTION
from pipeline.shards.header import read_size
from pipeline.shards.origin import below_root, is_http
from pipeline.shards.store import Blob, Cache, Store, StoreError

MANIFEST = "manifest.json"
TARS_QUERY = "tars.query"
"""Beside the manifest, readable by its owner alone: the query that signs the tars' URLs, and is part of no manifest."""
FORMAT = 2
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
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

    @property
    def tar(self) -> Blob:
        return Blob(f"{self.name}.tar", self.bytes, self.sha256)

    @property
    def index(self) -> Blob:
        return Blob(f"{self.name}.index.npy", self.index_bytes, self.index_sha256)


class Manifest(BaseModel):
    """A data set: its classes and shards. `digest` covers both, so two data sets with equal digests are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2]
    classes: list[str]
    shards: list[Shard]
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
        data = store.read(MANIFEST)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot read the manifest: {reason}; make one with launch/shards.py") from error
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        found = re.search(rb'"format": *(\d+)', data)
        if found and int(found[1]) != FORMAT:
            reason = f"format {found[1].decode()}, but this version reads format {FORMAT}"
        else:
            reason = f"not a manifest: {error}"
        raise InputError(f"{path}: {reason}; pack the data again") from error
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
        return f"{tars}?{path.read_text().strip().removeprefix('?')}"
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
        return np.load(BytesIO(data), allow_pickle=False)

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
            header = self._tars[part].pread(entry.tar, start, end - start)
            with tarfile.open(fileobj=BytesIO(header), mode="r:") as members:
                name = next(iter(members)).name
        except (tarfile.TarError, StopIteration, StoreError, OSError):
            return f"row {row}"
        return key_and_extension(name)[0]

    def prefetch(self, shards: npt.NDArray[np.int64]) -> None:
        """Start fetching remote shards that will be needed soon."""
        for part, store in enumerate(self._tars):
            store.prefetch([self._shards[shard][1].tar for shard in shards if self._shards[shard][0] == part])

    def close(self) -> None:
        for store in {*self._stores, *self._tars}:
            store.close()


def _named(annotations: Annotations | None) -> str:
    return f"{annotations} annotations" if annotations else "labelled images"


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
