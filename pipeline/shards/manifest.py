"""Reads and writes manifest.json: the classes, shards and digests of a packed data set.

    classes, shards ──Manifest.of──▶ Manifest ──encode──▶ manifest.json ──read_manifest──▶ Manifest

A manifest may come from anybody, so whatever it says is checked before it is used.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import pydantic.dataclasses
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from pipeline import files, json_text
from pipeline.config import validated
from pipeline.errors import InputError
from pipeline.shards.filesystems import below_root, is_http, sha256_hex
from pipeline.shards.store import Blob, Store, StoreError

MANIFEST = "manifest.json"
TARS_QUERY = "tars.query"
"""The file beside the manifest that holds the query that signs the tars' URLs. Only its owner may read it, and no
manifest contains it."""
FORMAT = 2
MAX_MANIFEST_BYTES = 64 << 20
"""The limit for a manifest, enough for some 250,000 shards."""
MAX_CLASSES = 1 << 20
"""A larger label number is taken for a mistake rather than for a class list of that length."""

Annotations = Literal["semantic", "objects", "unlabelled"]
"""What is known of an image other than its class. Nothing is known of unlabelled ones: their data set has no classes,
and their label is 0."""

EXTENSIONS: dict[Annotations | None, str | None] = {
    None: "cls",
    "semantic": "seg.png",
    "objects": "json",
    "unlabelled": None,
}
"""The extension of the member that follows each image's in the tar, its class where there are no annotations."""

CONTENTS: dict[Annotations | None, str] = {
    None: "labelled images",
    "semantic": "images with label maps",
    "objects": "images with objects",
    "unlabelled": "images without labels",
}
"""What messages call the contents of a data set."""


# A dataclass with slots, because a large data set has 10^5 of them.
@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Shard:
    name: Annotated[str, AfterValidator(below_root)]
    """The path below the root, without .tar."""
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


def _check_format(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"format {number}, but this version reads format {FORMAT}")
    return number


def _check_classes(names: list[str]) -> list[str]:
    for name in names:
        if not name.isprintable():
            raise ValueError(f"{name[:100]!r} is no class name: control characters are refused")
    if len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise ValueError(f"expected at most {MAX_CLASSES} names, each once")
    return names


class Manifest(BaseModel):
    """A data set: its classes and shards. `digest` covers both, so two data sets with equal digests are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Annotated[int, AfterValidator(_check_format)]
    classes: Annotated[list[str], FailFast(), AfterValidator(_check_classes)]
    shards: Annotated[list[Shard], FailFast(), Field(min_length=1)]
    samples: int
    digest: str
    tars: str | None = None
    """The folder or URL of the tars where they do not lie beside the manifest."""
    annotations: Annotations | None = None
    """The kind of the annotations; None where each image has a class, its label."""

    @property
    def num_labels(self) -> int:
        """The number of labels that records may have."""
        return 1 if self.annotations == "unlabelled" else len(self.classes)

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
            digest=_compute_digest(classes, shards, annotations),
            tars=tars,
            annotations=annotations,
        )

    def encode(self) -> bytes:
        """Returns the text of manifest.json."""
        # Manifests of labelled images have no such key: they are older than annotations, and their bytes stay the same.
        hidden = None if self.annotations else {"annotations"}
        text = self.model_dump_json(indent=1, exclude=hidden)
        return f"{text}\n".encode()


def _compute_digest(classes: list[str], shards: list[Shard], annotations: Annotations | None) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    if annotations:
        digest.update(f"\n{annotations}".encode())
    for shard in shards:
        fields = (
            shard.name,
            shard.samples,
            shard.bytes,
            shard.sha256,
            shard.index_bytes,
            shard.index_sha256,
        )
        digest.update("\n{} {} {} {} {} {}".format(*fields).encode())
    return digest.hexdigest()


def read_manifest(root: str | Path, store: Store | None = None) -> Manifest:
    """Reads and checks ROOT/manifest.json. Raises InputError where it is missing, damaged or contradicts itself."""
    store = store or Store(root)
    path = store.url(MANIFEST)
    try:
        data = store.read(MANIFEST, MAX_MANIFEST_BYTES)
    except (OSError, StoreError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, StoreError):
            # The store of a remote data set may be down, which is not the user's mistake.
            if not store.is_local:
                raise
            reason = str(error).removeprefix(f"{path}: ")
        remedy = "make one with launch/shards.py"
        if store.is_local and not Path(store.root).exists():
            remedy = f"there is no {store.root}: name a packed data set or a folder of images"
        raise InputError(f"{path}: cannot read the manifest: {reason}; {remedy}") from error
    try:
        manifest = validated(Manifest, json_text.read(data, path), path)
    except InputError as error:
        raise InputError(f"{error}; copy or pack the data again") from None
    num_samples = sum(shard.samples for shard in manifest.shards)
    digest = _compute_digest(manifest.classes, manifest.shards, manifest.annotations)
    if (manifest.samples, manifest.digest) != (num_samples, digest):
        raise InputError(f"{path}: its digest and counts do not match its contents: it was edited; pack the data again")
    return manifest


def read_classes(root: str | Path) -> list[str]:
    """Returns the class list of a packed data set, for another one. Raises InputError where it has none."""
    manifest = read_manifest(root)
    if manifest.annotations == "unlabelled":
        raise InputError(f"{root}: holds {CONTENTS['unlabelled']}, so it has no classes: name a data set that has them")
    return manifest.classes


def locate_tars(tars: str, store: Store) -> str:
    """Returns where a manifest's tars are, with the query that signs their URLs if TARS_QUERY is beside it in `store`.

    Raises InputError where the file with the query cannot be read.
    """
    path = Path(store.root) / TARS_QUERY
    if not is_http(tars) or not store.is_local or not path.exists():
        return tars
    try:
        query = files.read(path).decode().strip().removeprefix("?")
    except OSError as error:
        remedy = "ask its owner for a copy, or index the tars into a folder of your own"
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    return f"{tars}?{query}"
