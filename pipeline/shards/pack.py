"""Pack images into WebDataset shards with index and manifest.

    Listing ──seeded shuffle──▶ tasks of one shard each ──workers: read, check, scale, write, hash──▶ shard-000000.tar …
                                                                                   + .index.npy + manifest.json

Annotated images (see ade20k.py, coco.py) have their annotations checked, scaled and written with them.

The same input gives the same bytes, with any number of workers. The output folder appears whole, by one rename. Until
then all is kept in .OUT.partial beside it, where the same command finds its finished shards after an interruption:

    .OUT.partial/lock            held while packing
    .OUT.partial/DIGEST/         of the input and the options, so that nothing of another pack is ever taken over
        data/                    becomes OUT
        done/shard-000000.json   what the worker recorded once its shard was whole
        spill/                   images of Parquet files on their way, see parquet.py
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from pipeline import files, keys
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards import image_sources, images, object_annotations, parquet, picture_credits
from pipeline.shards.bad_samples import SHOWN, BadSource, first_few, write_faults, write_skipped
from pipeline.shards.image_sources import ImageEntry, ImageListing, Table
from pipeline.shards.images import BadImageError
from pipeline.shards.index import (
    ANNOTATED_RECORD,
    EXTENSIONS,
    MANIFEST,
    RECORD,
    Annotations,
    Manifest,
    Shard,
)
from pipeline.shards.object_annotations import BadObjectsError
from pipeline.shards.process_pool import advance, each
from pipeline.shards.tar import padded

_VERSION = 1
"""Of the bytes that packing writes: part of the digest that lets a pack continue."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """What shapes the bytes of the shards, beside the images."""

    max_side: int | None
    quality: int | None
    bits_stored: int | None
    samples_per_shard: int
    seed: int


def pack(
    source: str | Path | ImageListing,
    out: Path,
    *,
    classes: list[str] | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    bits_stored: int | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 1,
) -> Manifest:
    """Pack the images of `source` into the folder `out`, and return the manifest.

    `source` is a listing, or what `sources.find` makes one of, where `classes` fixes the class map (a validation split
    takes the training split's). Images with a side longer than `max_side` pixels are scaled down and become JPEGs of
    `quality`; with either, formats and kinds that DALI does not decode as Pillow does are converted too. `bits_stored`
    scales 16-bit values, see images.prepare. `skip_bad` leaves out images that cannot be used and lists them in
    skipped.jsonl. An ATTRIBUTION.txt of the images goes with them.

    Raises InputError for anything wrong with the input: first for all that listing it has found, then for all images
    of all shards. It then leaves nothing behind but OUT-refused.jsonl, the list where that is long. Whatever else ends
    it, what is done is kept for the next attempt.
    """
    out = out.resolve()
    _refuse_full(out)
    listing = source if isinstance(source, ImageListing) else image_sources.find(source, classes)
    options = _Options(max_side, quality, bits_stored, samples_per_shard, seed)
    identity = [_VERSION, PIL.__version__, listing.digest, dataclasses.asdict(options)]
    with _partial(out, fingerprint(identity)[:16]) as folder:
        bad = list(listing.bad)
        _refuse_bad(bad, out, skip_bad)  # before any image is decoded, which may take hours
        # Neighbours in a tar are read together, so they should not be of one class.
        order = keys.permutation(keys.key(seed, keys.Stream.PACK), len(listing.entries))
        spilled = _spill(listing, order, folder / "spill", workers)
        tasks = _plan(listing, order, folder, spilled, options)
        shards = []
        num_images = len(listing.entries)
        workers = min(workers, -(-num_images // samples_per_shard))
        for done in each(_pack_shard, tasks, workers=workers, total=num_images, name="packing"):
            bad += done.bad
            shards += [done.shard] if done.shard else []
        _refuse_bad(bad, out, skip_bad)
        if not shards:
            raise InputError(f"{out}: not one image can be packed:\n{first_few(bad)}")
        data = folder / "data"
        write_skipped(data, bad)
        place = listing.tables[0].path if listing.tables else listing.entries[0].place
        if credit := picture_credits.find_attribution(place):
            files.write(data / picture_credits.ATTRIBUTION, f"{credit}\n".encode())
        manifest = Manifest.of(listing.classes, shards, annotations=listing.annotations)
        files.write(data / MANIFEST, manifest.encode())
        # rename(2) replaces an empty folder and fails on one that was filled meanwhile.
        data.rename(out)
    _refused(out).unlink(missing_ok=True)
    return manifest


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something; give an empty or a new folder to --out")


def _refused(out: Path) -> Path:
    """Where all that was wrong with the input is listed, where it is more than a message holds."""
    return out.with_name(f"{out.name}-refused.jsonl")


def _refuse_bad(bad: list[BadSource], out: Path, skip_bad: bool) -> None:
    if not bad or skip_bad:
        return
    lines = ["images that cannot be packed:", first_few(bad)]
    if len(bad) > SHOWN:
        write_faults(_refused(out), bad)
        lines.append(f"all {len(bad)} are listed in {_refused(out)}")
    raise InputError("\n".join([*lines, "repair or remove them; --skip-bad leaves such images out"]))


@contextlib.contextmanager
def _partial(out: Path, name: str) -> Iterator[Path]:
    """The folder .OUT.partial/NAME, locked, with what an earlier attempt at the same has left there.

    It is removed at the end and after an InputError, with parents that were made for it, and kept otherwise.
    """
    partial = out.with_name(f".{out.name}.partial")
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror}") from error
    with _locked(partial / "lock", out):
        _refuse_full(out)  # by one who has just finished
        for other in partial.iterdir():
            if other.name not in (name, "lock"):  # of other input or options
                shutil.rmtree(other, ignore_errors=True)
        try:
            for part in ("data", "done", "spill"):
                (partial / name / part).mkdir(parents=True, exist_ok=True)
            yield partial / name
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else has put something there
                for parent in created:
                    parent.rmdir()
            raise
        except BaseException:
            print(f"{partial} keeps what is done: the same command goes on from there", file=sys.stderr)
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, wait=False))
        except (BlockingIOError, FileNotFoundError):  # its holder has just removed the folder
            raise InputError(f"{out}: somebody else is packing into it; wait for it or give another --out") from None
        yield


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to write."""

    folder: Path
    number: int
    entries: list[ImageEntry]
    first: int
    """Position of the first entry in the shuffled order."""
    spilled: list[Path]
    """Where the images are if they come from Parquet files."""
    num_classes: int
    annotations: Annotations | None
    options: _Options

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


@dataclasses.dataclass(frozen=True)
class _Done:
    shard: Shard | None
    """None where not one image could be packed."""
    bad: list[BadSource]


def _spill(listing: ImageListing, order: npt.NDArray[np.int64], folder: Path, workers: int) -> list[Path]:
    """Bring the images of Parquet files near the order of the shards; where they are then."""
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    targets = [folder / f"{number:05d}" for number in range(len(listing.tables))]
    starts = np.cumsum([0, *(len(table.rows) for table in listing.tables)])
    tasks = (
        (table, positions[start : start + len(table.rows)], target)
        for table, start, target in zip(listing.tables, starts, targets, strict=False)
    )
    if targets:
        for _ in each(_spill_table, tasks, workers=workers, total=len(order), name="reading"):
            pass
    return targets


def _spill_table(task: tuple[Table, npt.NDArray[np.int64], Path]) -> None:
    table, positions, target = task
    if parquet.is_spilled(target):
        advance(len(positions))
    else:
        parquet.spill(table.path, table.rows, positions, target)


def _plan(
    listing: ImageListing, order: npt.NDArray[np.int64], folder: Path, spilled: list[Path], options: _Options
) -> Iterator[_Task]:
    for number, first in enumerate(range(0, len(order), options.samples_per_shard)):
        chosen = order[first : first + options.samples_per_shard]
        entries = [listing.entries[i] for i in chosen]
        yield _Task(folder, number, entries, first, spilled, len(listing.classes), listing.annotations, options)


def _pack_shard(task: _Task) -> _Done:
    """Write one shard, unless an earlier attempt has, whose bytes are then compared with what it recorded."""
    record = task.folder / "done" / f"{task.name}.json"
    if done := _earlier(task, record):
        advance(len(task.entries))
        return done
    tar, index = _paths(task)
    with _HashedFile(tar) as file:
        records, bad = _write_tar(task, file)
    buffer = BytesIO()
    record_type = ANNOTATED_RECORD if task.annotations else RECORD
    np.save(buffer, np.array(records, record_type), allow_pickle=False)
    with _HashedFile(index) as index_file:
        index_file.write(buffer.getvalue())
    shard = None
    if records:
        shard = Shard(
            name=task.name,
            samples=len(records),
            bytes=tar.stat().st_size,
            sha256=file.sha256,
            index_bytes=index.stat().st_size,
            index_sha256=index_file.sha256,
        )
    else:
        tar.unlink()
        index.unlink()
    text = {"shard": shard and dataclasses.asdict(shard), "bad": bad}
    files.write(record, json.dumps(text).encode())
    return _Done(shard, bad)


def _paths(task: _Task) -> tuple[Path, Path]:
    return task.folder / "data" / f"{task.name}.tar", task.folder / "data" / f"{task.name}.index.npy"


def _earlier(task: _Task, record: Path) -> _Done | None:
    try:
        tree = json.loads(record.read_bytes())
        shard = Shard(**tree["shard"]) if tree["shard"] else None
        for path, blob in zip(_paths(task), (shard.tar, shard.index) if shard else (), strict=False):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.sha256:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Done(shard, [BadSource(*fields) for fields in tree["bad"]])


def _write_tar(task: _Task, file: "_HashedFile") -> tuple[list[tuple[int, ...]], list[BadSource]]:
    """Write the task's images, each with its .cls or annotation, and return a record's fields for each; and the images
    left out."""
    spilled = parquet.read_spilled(task.spilled, task.first, task.first + len(task.entries)) if task.spilled else None
    records, bad, options = [], [], task.options
    with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in task.entries:
            place, annotation = entry.place, None
            try:
                image = next(spilled) if spilled else _read(place)
                data, head = images.prepare(image, options.max_side, options.quality, options.bits_stored)
                if isinstance(entry.annotation, str):
                    place = entry.annotation
                    annotation = images.prepare_map(_read(place), image, head, task.num_classes)
                elif entry.annotation:
                    annotation = object_annotations.prepare(
                        entry.annotation, images.size(image), head, task.num_classes
                    )
            except (BadImageError, BadObjectsError) as error:
                bad.append(BadSource(place, entry.key, str(error)))
            else:
                header = tar.offset
                offset = _add(tar, f"{entry.key}.{head.extension}", data)
                record = header, offset, len(data), entry.label, head.height, head.width, zlib.crc32(data)
                behind = str(entry.label).encode() if annotation is None else annotation
                offset = _add(tar, f"{entry.key}.{EXTENSIONS[task.annotations]}", behind)
                if annotation is not None:
                    record += offset, len(annotation), zlib.crc32(annotation)
                records.append(record)
            advance()
    return records, bad


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Write a member; where its first byte is."""
    member = tarfile.TarInfo(name)  # owner, mode and time are the same for all
    member.size = len(data)
    tar.addfile(member, BytesIO(data))
    return tar.offset - padded(len(data))


def _read(path: str) -> bytes:
    try:
        return files.read(path, images.MAX_SCALED_BYTES)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error


class _HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written, and is on the disk when it is closed."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._sha256.update(data)
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
        super().close()
