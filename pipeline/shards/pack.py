"""Packs images into WebDataset shards with index and manifest.

    ImageListing ──seeded shuffle──▶ tasks, a shard each ──workers: read, check, scale, write, hash──▶ shard-000000.tar
                                                                                     + .index.npy + manifest.json

Annotated images (see ade20k.py, coco.py) have their annotations checked, scaled and written with them.

The same input gives the same bytes, with any number of workers. The output folder appears whole, by one rename. Until
then everything is in .OUT.partial beside it, where the same command finds its finished shards after an interruption:

    .OUT.partial/lock            held while packing
    .OUT.partial/DIGEST/         of the input and the options, so that the work of another pack is never taken over
        data/                    becomes OUT
        done/shard-000000.json   what the worker recorded once its shard was whole
        spill/                   images of Parquet files and tars, sorted for the shards: see spill.py

A split into training and validation is two data sets in one folder: OUT/train and OUT/val, likewise in data/, done/ and
spill/.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from pipeline import files, keys
from pipeline.config import fingerprint
from pipeline.errors import InputError
from pipeline.shards import image_sources, images, object_annotations, own_images, picture_credits, spill
from pipeline.shards.bad_samples import SHOWN, BadSource, first_few, write_faults, write_skipped
from pipeline.shards.image_listing import ImageEntry, ImageListing
from pipeline.shards.images import BadImageError
from pipeline.shards.index import encode_records, record_of
from pipeline.shards.manifest import EXTENSIONS, MANIFEST, Annotations, Manifest, Shard
from pipeline.shards.object_annotations import BadObjectsError
from pipeline.shards.process_pool import advance, map_tasks
from pipeline.shards.spill import Container
from pipeline.shards.tar import padded

log = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]

_VERSION = 1
"""The version of the bytes that packing writes, which is part of the digest that lets a pack continue."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """The settings that shape the bytes of the shards."""

    max_side: int | None
    quality: int | None
    bits_stored: int | None
    samples_per_shard: int
    seed: int


def pack(
    source: str | Path | ImageListing | Mapping[str, ImageListing],
    out: Path,
    *,
    classes: list[str] | None = None,
    val_fraction: float | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    bits_stored: int | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 1,
) -> Manifest:
    """Packs the images of `source` into the folder `out`, and returns the manifest.

    `source` is a listing, or a path that `image_sources.find` lists. `classes` then fixes the class list: a validation
    split takes the training split's. Listings by name become a data set each, OUT/NAME. Images with a side longer than
    `max_side` pixels are scaled down and become JPEGs of `quality`; with either argument, formats and kinds that DALI
    does not decode as Pillow does are converted too. `bits_stored` scales 16-bit values, see images.prepare.
    `skip_bad` skips images that cannot be used and lists them in skipped.jsonl. The images' ATTRIBUTION.txt is copied.
    With `val_fraction`, OUT/train and OUT/val become data sets that `own_images.split` makes of the source. The
    manifest returned is the first, that of training.

    Raises InputError for anything wrong with the input: first for everything that was found while listing, then for
    all images of all shards. In this case it leaves nothing behind but OUT-refused.jsonl, the list of the problems if
    it is long. After any other error the finished shards are kept for the next attempt.
    """
    out = out.resolve()
    files.require_empty(out)
    splits = _list_splits(source, classes, val_fraction)
    options = _Options(max_side, quality, bits_stored, samples_per_shard, seed)
    identity = [
        _VERSION,
        PIL.__version__,
        *[part.digest for part in splits.values()],
        dataclasses.asdict(options),
    ]
    with _open_partial(out, fingerprint(identity)[:16]) as folder:
        # A split of one listing has all of its problems.
        bad = list(dict.fromkeys(fault for part in splits.values() for fault in part.bad))
        # Before any image is decoded, which may take hours.
        _check_bad(bad, out, skip_bad)
        packed = {}
        for name, part in splits.items():
            packed[name], more = _pack_shards(part, folder, name, options, workers)
            bad += more
        _check_bad(bad, out, skip_bad)
        for name, shards in packed.items():
            if not shards:
                raise InputError(f"{out / name}: not one image can be packed:\n{first_few(bad)}")
        data = folder / "data"
        write_skipped(data, bad)
        manifests = [_write_manifest(splits[name], shards, data / name) for name, shards in packed.items()]
        # rename(2) replaces an empty folder and fails on one that was filled meanwhile.
        data.rename(out)
    # The list of an earlier attempt's problems is out of date.
    _refused_path(out).unlink(missing_ok=True)
    return manifests[0]


def _list_splits(
    source: str | Path | ImageListing | Mapping[str, ImageListing],
    classes: list[str] | None,
    val_fraction: float | None,
) -> Mapping[str, ImageListing]:
    """Returns the listing of each data set by the name of its folder in the output, empty for the output itself."""
    if isinstance(source, Mapping):
        return source
    listing = source if isinstance(source, ImageListing) else image_sources.find(source, classes)
    return {"": listing} if val_fraction is None else own_images.split(listing, val_fraction)


def _pack_shards(
    listing: ImageListing, folder: Path, split: str, options: _Options, workers: int
) -> tuple[list[Shard], list[BadSource]]:
    """Returns the shards of a split, or of everything where its name is empty, and the images that cannot be packed."""
    for child in ("data", "done", "spill"):
        (folder / child / split).mkdir(parents=True, exist_ok=True)
    # Neighbours in a tar are read together, so they should not be of one class.
    order = keys.permutation(keys.key(options.seed, keys.Stream.PACK), len(listing.entries))
    spilled = _spill(listing, order, folder / "spill" / split, workers)
    tasks = _plan(listing, order, folder, split, spilled, options)
    num_images = len(listing.entries)
    num_shards = -(-num_images // options.samples_per_shard)
    results = map_tasks(
        _pack_shard,
        tasks,
        workers=min(workers, num_shards),
        total=num_images,
        name="packing",
    )
    shards = []
    bad = []
    for done in results:
        bad += done.bad
        if done.shard:
            shards.append(done.shard)
    return shards, bad


def _write_manifest(listing: ImageListing, shards: list[Shard], data: Path) -> Manifest:
    """Writes the credits of the images and, last, the manifest: what has one is whole."""
    source_path = listing.containers[0].source.place if listing.containers else listing.entries[0].place
    attribution = picture_credits.find_attribution(source_path)
    if attribution:
        files.write(data / picture_credits.ATTRIBUTION, f"{attribution}\n".encode())
    manifest = Manifest.of(listing.classes, shards, annotations=listing.annotations)
    files.write(data / MANIFEST, manifest.encode())
    return manifest


def _refused_path(out: Path) -> Path:
    """Returns the path of the list of all problems with the input, written where they are more than a message holds."""
    return out.with_name(f"{out.name}-refused.jsonl")


def _check_bad(bad: list[BadSource], out: Path, skip_bad: bool) -> None:
    if not bad or skip_bad:
        return
    lines = ["images that cannot be packed:", first_few(bad)]
    if len(bad) > SHOWN:
        path = _refused_path(out)
        write_faults(path, bad)
        lines.append(f"all {len(bad)} are listed in {path}")
    lines.append("repair or remove them; launch/shards.py pack with --skip-bad skips such images")
    raise InputError("\n".join(lines))


@contextlib.contextmanager
def _open_partial(out: Path, name: str) -> Iterator[Path]:
    """Yields the folder .OUT.partial/NAME, locked, with what an earlier attempt with the same input has left there.

    It is removed at the end and after an InputError, with parents that were made for it, and kept otherwise.
    """
    partial = files.partial_of(out)
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror}") from error
    with _lock(partial / "lock", out):
        # Another process may have finished between the first check and the lock.
        files.require_empty(out)
        # What was packed from other input or with other options is of no use any more.
        for other in partial.iterdir():
            if other.name not in (name, "lock"):
                shutil.rmtree(other, ignore_errors=True)
        folder = partial / name
        try:
            yield folder
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)
            # A parent in which somebody has put something meanwhile is not empty, and stays.
            with contextlib.suppress(OSError):
                for parent in created:
                    parent.rmdir()
            raise
        except BaseException:
            log.info(f"{partial} keeps what is done: the same command continues from there")
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, out: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, wait=False))
        # The file is missing where its holder has just removed the folder.
        except (BlockingIOError, FileNotFoundError):
            raise InputError(f"{out}: somebody else is packing into it; wait for it or give another --out") from None
        yield


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to write."""

    folder: Path
    split: str
    number: int
    entries: list[ImageEntry]
    first: int
    """The position of the first entry in the shuffled order."""
    spilled: list[Path]
    """The files that the images of containers were sorted into."""
    num_classes: int
    annotations: Annotations | None
    options: _Options

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


@dataclasses.dataclass(frozen=True)
class _Done:
    shard: Shard | None
    """The shard; None where not one image could be packed."""
    bad: list[BadSource]


def _spill(listing: ImageListing, order: Int64Array, folder: Path, workers: int) -> list[Path]:
    """Sorts the images of containers near the order of the shards, and returns the files that they are in then."""
    if not listing.containers:
        return []
    # The inverse of the order: where in the shards each entry goes.
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    tasks = []
    start = 0
    for number, container in enumerate(listing.containers):
        end = start + len(container.rows)
        tasks.append((container, positions[start:end], folder / f"{number:05d}"))
        start = end
    for _ in map_tasks(_spill_container, tasks, workers=workers, total=len(order), name="reading"):
        pass
    return [target for _, _, target in tasks]


def _spill_container(task: tuple[Container, Int64Array, Path]) -> None:
    container, positions, target = task
    if spill.is_spilled(target):
        advance(len(positions))
    else:
        spill.spill(container, positions, target)


def _plan(
    listing: ImageListing,
    order: Int64Array,
    folder: Path,
    split: str,
    spilled: list[Path],
    options: _Options,
) -> Iterator[_Task]:
    for number, first in enumerate(range(0, len(order), options.samples_per_shard)):
        chosen = order[first : first + options.samples_per_shard]
        yield _Task(
            folder=folder,
            split=split,
            number=number,
            entries=[listing.entries[index] for index in chosen],
            first=first,
            spilled=spilled,
            num_classes=len(listing.classes),
            annotations=listing.annotations,
            options=options,
        )


def _pack_shard(task: _Task) -> _Done:
    """Writes one shard, unless an earlier attempt did so and its bytes still match what was recorded."""
    record = task.folder / "done" / task.split / f"{task.name}.json"
    done = _read_done(task, record)
    if done:
        advance(len(task.entries))
        return done
    tar, index = _shard_paths(task)
    with files.HashedFile(tar) as file:
        records, bad = _write_tar(task, file)
    with files.HashedFile(index) as index_file:
        index_file.write(encode_records(np.array(records, record_of(task.annotations))))
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
    tree = {"shard": shard and dataclasses.asdict(shard), "bad": bad}
    files.write(record, json.dumps(tree).encode())
    return _Done(shard, bad)


def _shard_paths(task: _Task) -> tuple[Path, Path]:
    data = task.folder / "data" / task.split
    return data / f"{task.name}.tar", data / f"{task.name}.index.npy"


def _read_done(task: _Task, record: Path) -> _Done | None:
    """Returns what an earlier attempt recorded of this shard; None where it did not finish it or its files differ."""
    try:
        tree = json.loads(record.read_bytes())
        shard = None
        if tree["shard"]:
            shard = Shard(**tree["shard"])
            tar, index = _shard_paths(task)
            if files.sha256(tar) != shard.sha256 or files.sha256(index) != shard.index_sha256:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Done(shard, [BadSource(*fields) for fields in tree["bad"]])


def _write_tar(task: _Task, file: files.HashedFile) -> tuple[list[tuple[int, ...]], list[BadSource]]:
    """Writes the task's images, each with its .cls or annotation, if any.

    Returns the fields of a record for each image, and the images that were skipped.
    """
    spilled = None
    if task.spilled:
        spilled = spill.read_spilled(task.spilled, task.first, task.first + len(task.entries))
    records, bad = [], []
    with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in task.entries:
            # The file that an error is reported for: the image's, and then its annotation's.
            path = entry.place
            annotation = None
            try:
                image = next(spilled) if spilled else _read(path)
                data, header = images.prepare(
                    image,
                    task.options.max_side,
                    task.options.quality,
                    task.options.bits_stored,
                )
                if isinstance(entry.annotation, str):
                    path = entry.annotation
                    annotation = images.prepare_map(_read(path), image, header, task.num_classes)
                elif entry.annotation:
                    size = images.size(image)
                    annotation = object_annotations.prepare(entry.annotation, size, header, task.num_classes)
            except (BadImageError, BadObjectsError) as error:
                bad.append(BadSource(path, entry.key, str(error)))
            else:
                start = tar.offset
                record = (
                    start,
                    _add_member(tar, f"{entry.key}.{header.extension}", data),
                    len(data),
                    entry.label,
                    header.height,
                    header.width,
                    zlib.crc32(data),
                )
                extension = EXTENSIONS[task.annotations]
                name = f"{entry.key}.{extension}"
                if annotation is not None:
                    offset = _add_member(tar, name, annotation)
                    record += offset, len(annotation), zlib.crc32(annotation)
                elif extension:
                    _add_member(tar, name, str(entry.label).encode())
                records.append(record)
            advance()
    return records, bad


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Writes a member and returns the offset of its first byte in the tar."""
    # Owner, mode and time have the same defaults for all members, so the tar's bytes depend on its contents alone.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))
    return tar.offset - padded(len(data))


def _read(path: str) -> bytes:
    try:
        return files.read(path, images.MAX_SCALED_BYTES)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error
