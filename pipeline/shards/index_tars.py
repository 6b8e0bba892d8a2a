"""Indexes existing tars in place, without changing them.

    tars ──scan, in parallel──▶ Scans ──▶ class list ──▶ .index.npy of each, manifest.json
                                  └─────▶ faults

Indexing takes some 200 bytes of memory a sample.
"""

import functools
import hashlib
import logging
import os
import shlex
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from braceexpand import braceexpand

from pipeline import files
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.shards import images
from pipeline.shards.bad_samples import SHOWN, SampleFault, first_few, write_skipped
from pipeline.shards.filesystems import below_root, is_http, split_query
from pipeline.shards.image_sources import EXTENSIONS
from pipeline.shards.index import RECORD, encode_records
from pipeline.shards.labels import check_first, is_number, number_names
from pipeline.shards.manifest import MANIFEST, MAX_CLASSES, TARS_QUERY, Manifest, Shard
from pipeline.shards.part_names import NO_LABEL, USUAL, PartNames, describe_parts
from pipeline.shards.process_pool import advance, map_tasks
from pipeline.shards.scan_tar import REPACK, Look, Scan, look_at_parts, samples, scan_tar
from pipeline.shards.store import Store
from pipeline.shards.tar import Reader, TarError

log = logging.getLogger(__name__)

COMPRESSIONS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def index_tars(
    root: str,
    out: Path | None = None,
    *,
    labels: str = "auto",
    image: str | None = None,
    classes: list[str] | None = None,
    skip_bad: bool = False,
    decode: bool = True,
    workers: int = 1,
) -> tuple[Manifest | None, list[SampleFault]]:
    """Indexes the tars below `root`, a folder or URL; or those that a path with braces names: DIR/train-{000..146}.tar.

    Indices and manifest are written beside the tars, or into `out`. `labels` is cls, json:FIELD, folder, the name of
    another member, none, or auto, which the first sample decides; `image` names the member that is the image. Labels
    are names, which are sorted into a class list, or numbers; `classes` fixes the list. Every image is decoded, unless
    `decode` is False, which trusts the images' headers.

    Returns the manifest and all faults. With faults nothing is written and the manifest is None, unless `skip_bad`
    skips bad samples and lists them in skipped.jsonl. Raises InputError where nothing can be indexed at all.
    """
    root, query, names = split_root(root)
    store = Store(root + query)
    folder = _prepare_output(store, root, out)
    names, faults = _check_names(names or find_names(store))
    num_tars = len(names) + len(faults)
    parts = PartNames(image, None if labels == "auto" else _check_source(labels))
    # Usual names may be missing in some tars, whose samples are then faults.
    if image or not (labels in ("cls", "folder", NO_LABEL) or labels.startswith("json:")):
        _require_parts(store, names, parts)
    if parts.label is None:
        parts = PartNames(image, _choose_source(store, names))

    look = images.check if decode else images.header
    results = map_tasks(
        _scan,
        ((root + query, name, parts, look) for name in names),
        workers=min(workers, len(names)),
        total=len(names),
        name="indexing",
        unit="tar",
    )
    scans = list(results)
    if parts.label == NO_LABEL:
        annotations, classes = "unlabelled", []
    else:
        annotations, classes = None, _number_labels(scans, classes, store.root, are_names=parts.label == "folder")

    _report_scans(scans, num_tars)
    for scan in scans:
        faults += scan.faults
    scans = [scan for scan in scans if len(scan.records)]
    if faults and not skip_bad:
        return None, faults
    if not scans:
        raise InputError(f"{store.root}: not one sample can be used:\n{first_few(faults)}")
    write_skipped(folder, faults)
    # The manifest names the tars' location only where it is another one than its own.
    tars = store.root
    if store.is_local:
        location = Path(tars).resolve()
        tars = None if folder.resolve() == location else str(location)
    shards = [_write_index(scan, folder) for scan in scans]
    manifest = Manifest.of(classes, shards, tars, annotations)
    _write_query(folder / TARS_QUERY, query)
    # The manifest comes last: a folder that has one is whole.
    files.write(folder / MANIFEST, manifest.encode())
    return manifest, faults


def split_root(root: str) -> tuple[str, str, list[str]]:
    """Returns the folder or URL, the query that signs it, and the names of the tars if `root` is a pattern of them."""
    address, query = split_query(root)
    if not address.endswith((".tar", *COMPRESSIONS)) or Path(address).is_dir():
        return address, query, []
    before_braces, _, _ = address.partition("{")
    folder, _, _ = before_braces.rpartition("/")
    pattern = address.removeprefix(f"{folder}/") if folder else address
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(
            f"{redact(address)}: {error}; expected a pattern such as DIR/train-{{000..146}}.tar"
        ) from error
    if is_http(address):
        names = list(map(unquote, names))
    return folder or ".", query, names


def _write_query(path: Path, query: str) -> None:
    """Writes the query that signs the tars' URLs where training finds it and only its owner may read it."""
    path.unlink(missing_ok=True)
    if query:
        path.touch(mode=0o600)
        path.write_text(f"{query}\n")


def _report_scans(scans: list[Scan], num_tars: int) -> None:
    """Reports how many tars and files there are and can be used, and duplicate tars."""
    usable = [scan for scan in scans if scan.keys]
    num_files = sum(scan.num_members for scan in scans)
    num_ignored = sum(scan.num_ignored for scan in scans)
    num_usable = sum(sum(scan.num_parts) for scan in usable)
    num_samples = sum(len(scan.keys) for scan in usable)
    log.info(
        f"found {num_tars} tars with {num_files} files; "
        f"usable: {len(usable)} tars with {num_usable} files of {num_samples} samples; "
        f"refused: {num_tars - len(usable)} tars, {num_files - num_usable - num_ignored} files; "
        f"ignored: {num_ignored} files that are hidden, system files or without extension"
    )
    names: dict[str, str] = {}
    duplicates = []
    for scan in usable:
        first = names.setdefault(scan.sha256, scan.name)
        if first != scan.name:
            duplicates.append(scan.name)
    if duplicates:
        shown = ", ".join(duplicates[:SHOWN])
        log.warning(f"these tars repeat others, so their samples count more than once: {shown}")


def _prepare_output(store: Store, root: str, out: Path | None) -> Path:
    if store.is_local and not Path(store.root).is_dir():
        raise InputError(f"{store.root}: no such folder; index takes a folder or URL of .tar files")
    if out is None and not store.is_local:
        raise InputError(f"{store.root}: indices cannot be written there; give a local folder to --out")
    folder = out or Path(store.root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written; give another folder to --out")
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder / MANIFEST}: there is an index already; remove this file to make it again")
    return folder


def find_names(store: Store) -> list[str]:
    """Returns the names of the tars below the store's root, those of compressed tars too."""
    try:
        names = store.names()
    except OSError as error:
        raise InputError(f"{store.root}: cannot be listed: {error.strerror}") from error
    tars = [name for name in names if name.endswith((".tar", *COMPRESSIONS))]
    if not tars:
        raise InputError(f"{store.root}: no .tar files below it")
    return tars


def _check_names(names: list[str]) -> tuple[list[str], list[SampleFault]]:
    """Returns the names of the tars that can be read, and faults for the others."""
    good = []
    faults = []
    for name in names:
        try:
            below_root(name)
        except InputError as error:
            faults.append(SampleFault(name, None, f"{error}: rename it"))
            continue
        if name.endswith(COMPRESSIONS):
            reason = f"compressed, so no sample can be read by itself: decompress it, or {REPACK}"
            faults.append(SampleFault(name, None, reason))
        else:
            good.append(name)
    return good, faults


def _choose_source(store: Store, names: list[str]) -> str:
    """Returns where the labels are, judged by the first sample that can be read."""
    for name in names:
        try:
            with store.open(name) as stream:
                sample = next(samples(Reader(stream), [], USUAL))
        except (OSError, TarError, StopIteration):
            continue
        if "cls" in sample.members:
            source = "cls"
        elif sample.key.removeprefix("./").count("/"):
            source = "folder"
        else:
            raise InputError(
                f"{store.url(name)}: no label can be seen in the first sample, {sample.key!r} with parts "
                f"{', '.join(sample.members)}: {_describe_parts(store, name, USUAL)}\n"
                f"--unlabelled takes images without labels; if labels lie far from their images, pack the tars: "
                f"{packing_line(store.url(name))}"
            )
        log.info(f"labels: {source}, after the first sample {sample.key!r}; --labels overrides this")
        return source
    # There is no sample to judge by; the scan reports why.
    return "cls"


def _check_source(labels: str) -> str:
    part, colon, field = labels.partition(":")
    if not part or bool(colon) != bool(field) or (part.endswith("json") and not field):
        raise InputError(
            f"--labels {labels}: expected auto, cls, folder, json:FIELD or the name of another member, or none without "
            "labels"
        )
    return labels


def _require_parts(store: Store, tars: list[str], names: PartNames) -> None:
    """Raises InputError where no sample of the first tar has the image, or the label if that was named."""
    for tar in tars:
        found: set[str] = set()
        try:
            with store.open(tar) as stream:
                for sample in samples(Reader(stream), [], names):
                    found |= sample.members.keys()
                    has_label = names.label in (None, "folder", NO_LABEL) or names.label_part in found
                    if has_label and not found.isdisjoint(names.image_parts(EXTENSIONS)):
                        return
        except (OSError, TarError):
            # The scan reports why.
            continue
        if found:
            raise InputError(f"{store.url(tar)}: no sample has these parts; {_describe_parts(store, tar, names)}")


def _describe_parts(store: Store, tar: str, names: PartNames) -> str:
    with store.open(tar) as stream:
        return describe_parts(look_at_parts(stream), f"index {shlex.quote(store.root)}", names)


def packing_line(root: str, names: PartNames = USUAL) -> str:
    """Returns the line that packs the tars that `root` names, for what cannot be indexed."""
    options = ["--tars", redact(root), "--out", "DIR"]
    for option, name in zip(("--image", "--label"), names, strict=True):
        if name:
            options += [option, name]
    return f"python launch/shards.py pack {shlex.join(options)}"


def _scan(task: tuple[str, str, PartNames, Look]) -> Scan:
    root, name, parts, look = task
    try:
        with open_store(root).open(name) as stream:
            scan = scan_tar(stream, name, parts, look)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        scan = Scan(
            name=name,
            bytes=0,
            sha256="",
            records=np.empty(0, RECORD),
            keys=[],
            labels=[],
            faults=[SampleFault(name, None, reason)],
        )
    advance()
    return scan


# One store, and so one set of connections, for all tasks of a worker.
@functools.cache
def open_store(root: str) -> Store:
    return Store(root)


def _number_labels(scans: list[Scan], given: list[str] | None, where: str, *, are_names: bool) -> list[str]:
    """Changes the records' labels to positions in the class list, and returns the list.

    Drops samples without a class. Labels are numbers where most samples' labels are, unless `are_names`. Raises
    InputError where they count from 1 and `given` from 0.
    """
    counts = _count_labels(scans)
    numbers = {text: int(text) for text in counts if is_number(text)}
    num_numbered = sum(counts[text] for text in numbers)
    if are_names or 2 * num_numbered <= counts.total():
        classes = given or sorted(counts)
        positions = {name: number for number, name in enumerate(classes)}
    else:
        plausible = [number for number in numbers.values() if number < MAX_CLASSES]
        classes = given or number_names(plausible, where)
        # A number is the class of this name, or, where no name is a number, a position in the list.
        position_of = {int(name): position for position, name in enumerate(classes) if is_number(name)}
        if not position_of:
            check_first(numbers.values(), len(classes), where)
            position_of = {position: position for position in range(len(classes))}
        positions = {text: position_of[number] for text, number in numbers.items() if number in position_of}
    for scan in scans:
        texts = scan.labels
        position_of_label = np.array([positions.get(text, -1) for text in texts], np.int32)
        labels = scan.records["label"].copy()
        scan.records["label"] = position_of_label[labels]
        reasons = {}
        for row in np.flatnonzero(scan.records["label"] < 0).tolist():
            reasons[row] = f"label {texts[labels[row]]!r} is none of the {len(classes)} classes"
        scan.drop(reasons)
    return classes


def _count_labels(scans: list[Scan]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for scan in scans:
        num_samples = np.bincount(scan.records["label"], minlength=len(scan.labels))
        counts.update(dict(zip(scan.labels, num_samples.tolist(), strict=True)))
    # Without labels whose samples have all been dropped.
    return +counts


def _write_index(scan: Scan, folder: Path) -> Shard:
    name = scan.name.removesuffix(".tar")
    data = encode_records(scan.records)
    path = folder / f"{name}.index.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data)
    return Shard(
        name=name,
        samples=len(scan.records),
        bytes=scan.bytes,
        sha256=scan.sha256,
        index_bytes=len(data),
        index_sha256=hashlib.sha256(data).hexdigest(),
    )
