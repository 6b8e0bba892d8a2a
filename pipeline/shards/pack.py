"""Pack a class-per-folder tree of images into WebDataset shards with index and manifest.

    images/CLASS/**/NAME.jpg ──▶ sorted, seeded shuffle ──▶ shard-000000.tar … + .index.npy + manifest.json

The same input gives the same bytes. The output folder appears whole, by one rename, or not at all.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from webdataset.writer import ShardWriter

from pipeline import keys
from pipeline.errors import InputError
from pipeline.shards.index import IMAGE_EXTENSIONS, MANIFEST, Manifest, write_index

MAX_SIDE_PX = 65535  # what an index record holds


@dataclasses.dataclass(frozen=True)
class Source:
    """One image to pack."""

    path: Path
    key: str
    label: int


def pack(
    images: Path,
    out: Path,
    *,
    classes: list[str] | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> Manifest:
    """Pack the tree `images` into the folder `out` and return the manifest.

    `classes` fixes the class map (a validation split takes the training split's); None takes the folder names,
    sorted. Raises InputError for anything wrong with the tree, and leaves nothing behind.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something; give an empty or a new folder to --out")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; --images takes a folder with one sub-folder for each class")
    classes, sources = find_images(images, classes)
    # Neighbours in a tar are read together, so they should not be of one class.
    order = keys.permutation(keys.key(seed, keys.Stream.PACK), len(sources))

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        _write_shards(partial, [sources[i] for i in order], samples_per_shard)
        shards = [write_index(tar, len(classes)) for tar in sorted(partial.glob("*.tar"))]
        manifest = Manifest.of(classes, shards)
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        # rename(2) replaces an empty folder and fails on one that was filled meanwhile.
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else has put something there
            for parent in created:
                parent.rmdir()
        raise
    return manifest


def find_images(images: Path, classes: list[str] | None) -> tuple[list[str], list[Source]]:
    """The class list and every image below `images`, sorted by key. Raises InputError for a bad tree."""
    folders = sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in folders:
        if not name.isprintable():  # undecodable bytes of a file name show as lone surrogates
            raise InputError(f"{str(images / name)!r}: a class name is readable text in UTF-8: rename the folder")
    if not folders:
        raise InputError(f"{images}: no class folders; expected {images}/CLASS/IMAGE.jpg")
    if classes is None:
        classes = folders
    elif unknown := sorted(set(folders) - set(classes)):
        raise InputError(
            f"{images}: class folders {unknown} are not among the {len(classes)} classes of --classes-from; "
            "rename them or pack the split that has them first"
        )
    labels = {name: label for label, name in enumerate(classes)}
    by_key: dict[str, Source] = {}
    for name in folders:
        count = len(by_key)
        for path in filter(_is_image, _files(images / name)):
            key = _key(path.relative_to(images))
            if key in by_key:
                raise InputError(
                    f"{path} and {by_key[key].path} would both be {key!r} in the shards: rename one of them"
                )
            by_key[key] = Source(path, key, labels[name])
        if len(by_key) == count:
            raise InputError(f"{images / name}: no images; a class folder holds at least one {_EXTENSIONS} file")
    packed = {source.path for source in by_key.values()}
    if left_out := [path for path in _files(images) if path not in packed]:
        print(f"left out {len(left_out)} files that are no class's {_EXTENSIONS}: {left_out[0]} …", file=sys.stderr)
    return classes, [by_key[key] for key in sorted(by_key)]


_EXTENSIONS = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, links followed."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        found += [Path(parent, name) for name in files]
    return sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _key(path: Path) -> str:
    # WebDataset ends a sample's key at the first dot of its name.
    return path.with_suffix("").as_posix().replace(".", "_")


def _write_shards(folder: Path, sources: list[Source], samples_per_shard: int) -> None:
    pattern = str(folder / "shard-%06d.tar")
    sink = ShardWriter(pattern, maxcount=samples_per_shard, maxsize=1 << 40, verbose=0, mtime=0)
    with sink, tqdm(sources, "packing", unit="img", file=sys.stderr, disable=None) as progress:
        for source in progress:
            extension = source.path.suffix.lower().lstrip(".")
            sample = {"__key__": source.key, extension: _read_image(source.path), "cls": source.label}
            sink.write(sample)


def _read_image(path: Path) -> bytes:
    """The file's bytes, once PIL has decoded them: what does not decode today would stop a run tomorrow."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in ("JPEG", "PNG"):
                raise InputError(f"{path}: holds {image.format}, not JPEG or PNG: convert or remove it")
            if max(image.size) > MAX_SIDE_PX:
                raise InputError(f"{path}: {image.size} pixels; no side may exceed {MAX_SIDE_PX}: scale it down")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable image: {error}; repair or remove it") from error
    return data
