"""What lies where: the manifest of a data set and the binary index of each shard.

    DIR/manifest.json               classes, shards with counts and digests, the data set's digest
    DIR/shard-000000.tar            an ordinary WebDataset shard
    DIR/shard-000000.index.npy      one RECORD a sample, in the order of the tar

With the index a sample is one `pread`; nothing ever scans or extracts a tar in training.
"""

import functools
import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import fingerprint
from pipeline.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in the tar
        ("size", "<u4"),  # of the encoded image, in bytes
        ("label", "<i4"),  # position of the class in the manifest's list
        ("height", "<u2"),  # in pixels, as stored (EXIF orientation not applied)
        ("width", "<u2"),
        ("crc32", "<u4"),  # of the encoded image
    ]
)


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    samples: int = Field(gt=0)
    bytes: int
    sha256: str
    index_sha256: str


class Manifest(BaseModel):
    """A data set: its classes and shards. `digest` covers both, so two data sets with equal digests are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    classes: list[str]
    shards: list[Shard]
    samples: int
    digest: str

    @classmethod
    def of(cls, classes: list[str], shards: list[Shard]) -> "Manifest":
        samples = sum(shard.samples for shard in shards)
        return cls(format=FORMAT, classes=classes, shards=shards, samples=samples, digest=_digest(classes, shards))


def _digest(classes: list[str], shards: list[Shard]) -> str:
    return fingerprint({"classes": classes, "shards": [shard.model_dump() for shard in shards]})


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check DIR/manifest.json. Raises InputError where it is missing, broken, or disagrees with itself."""
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
            raise InputError(f"{path}: format {found!r}, but this version reads format {FORMAT}: pack the data again")
        manifest = Manifest.model_validate(tree)
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the manifest: {error.strerror}; make one with launch/shards.py pack"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(f"{path}: not a manifest: {error}; pack the data again") from error
    if manifest != Manifest.of(manifest.classes, manifest.shards):
        raise InputError(f"{path}: its digest and counts do not match its contents: it was edited; pack the data again")
    return manifest


class ShardSet:
    """A packed data set, opened: its manifest and, on demand, each shard's index.

    Opening compares every shard's size with the manifest, and reading an index compares its digest, so that shards
    and manifest of different packings are refused before training starts. Raises InputError.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.shard_samples = np.array([shard.samples for shard in self.manifest.shards], np.int64)
        for shard in self.manifest.shards:
            path = self.tar(shard.name)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(
                    f"{path}: {found}, but {MANIFEST} lists {shard.bytes} bytes: "
                    "copy the data set again or pack it again"
                )

    def __len__(self) -> int:
        return self.manifest.samples

    def tar(self, name: str) -> Path:
        return self.folder / f"{name}.tar"

    def index(self, shard: int) -> npt.NDArray[np.void]:
        """The records, [samples] of RECORD, of one shard."""
        entry = self.manifest.shards[shard]
        return _read_index(self.folder / f"{entry.name}.index.npy", entry.index_sha256)

    def records(self, shards: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """The records, [n], of samples given by shard number and row, both [n]."""
        records = np.empty(len(shards), RECORD)
        for shard in np.unique(shards):
            chosen = shards == shard
            records[chosen] = self.index(int(shard))[rows[chosen]]
        return records

    def key(self, shard: int, row: int) -> str:
        """The sample's name in its tar, for messages. Reads the tar from its beginning, which may be damaged: then
        the row has to do."""
        offset = self.index(shard)[row]["offset"]
        try:
            with tarfile.open(self.tar(self.manifest.shards[shard].name)) as members:
                return next(m.name.partition(".")[0] for m in members if m.offset_data == offset)
        except (tarfile.TarError, StopIteration):
            return f"row {row}"


# Indices are small (24 bytes a sample) but an epoch visits every shard; the bound keeps memory flat.
@functools.lru_cache(maxsize=4096)
def _read_index(path: Path, sha256: str) -> npt.NDArray[np.void]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the index: {error.strerror}; pack the data again") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path}: does not match {MANIFEST}: it was changed or belongs to another packing")
    return np.load(BytesIO(data), allow_pickle=False)


def write_index(tar: Path, classes: int) -> Shard:
    """Read a shard once, write its index beside it and return its entry for the manifest."""
    digest = hashlib.sha256()
    with tar.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    records = np.array(list(_scan(tar, classes)), RECORD)
    path = tar.with_suffix(".index.npy")
    with path.open("wb") as file:
        np.save(file, records, allow_pickle=False)
    return Shard(
        name=tar.stem,
        samples=len(records),
        bytes=tar.stat().st_size,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _scan(tar: Path, classes: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """One RECORD's fields for each sample of a tar: an image and a .cls member side by side, in any order."""
    with tarfile.open(tar) as members:
        for key, group in itertools.groupby(members, key=lambda member: member.name.partition(".")[0]):
            parts = {member.name.partition(".")[2]: member for member in group}
            images = [member for extension, member in parts.items() if extension in IMAGE_EXTENSIONS]
            if len(images) != 1 or parts.keys() != {"cls", images[0].name.partition(".")[2]}:
                raise InputError(f"{tar}: sample {key!r} has parts {sorted(parts)}; expected one image and its .cls")
            label = int(_read(members, parts["cls"]))
            if not 0 <= label < classes:
                raise InputError(f"{tar}: sample {key!r} has class {label}, but there are {classes} classes")
            data = _read(members, images[0])
            width, height = Image.open(BytesIO(data)).size
            yield images[0].offset_data, images[0].size, label, height, width, zlib.crc32(data)


def _read(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = members.extractfile(member)
    if file is None:
        raise InputError(f"{members.name}: {member.name} is not a regular file")
    return file.read()
