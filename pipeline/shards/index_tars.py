"""Index tars that others made, where they lie and as they are.

    tars ──scan, in parallel──▶ Scans ──▶ class list ──▶ .index.npy of each, manifest.json
                                  └─────▶ faults

Some 200 bytes a sample are held in memory.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
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
from pipeline.shards.index import MANIFEST, MAX_CLASSES, RECORD, TARS_QUERY, Manifest, Shard
from pipeline.shards.labels import check_first, is_number, numbered
from pipeline.shards.process_pool import advance, each
from pipeline.shards.scan_tar import Scan, samples, scan_tar
from pipeline.shards.store import Store
from pipeline.shards.tar import Reader, TarError

_COMPRESSIONS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def index_tars(
    root: str,
    out: Path | None = None,
    *,
    labels: str = "auto",
    classes: list[str] | None = None,
    skip_bad: bool = False,
    decode: bool = True,
    workers: int = 1,
) -> tuple[Manifest | None, list[SampleFault]]:
    """Index the tars below `root`, a folder or URL; or those that a path with braces names: DIR/train-{000..146}.tar.

    Indices and manifest go beside the tars, or into `out`. `labels` is cls, json:FIELD, folder, or auto, which the
    first sample decides. Labels are names, which are sorted into a class list, or numbers; `classes` fixes the list.
    Every image is decoded, unless `decode` is False, which trusts what its header says.

    Returns the manifest and all faults. With faults nothing is written and the manifest is None, unless `skip_bad`
    leaves what is bad out, listed in skipped.jsonl. Raises InputError where nothing can be indexed at all.
    """
    root, query, names = _split(root)
    store = Store(root + query)
    folder = _output_folder(store, root, out)
    names, faults = _check_names(names or _find(store))
    num_tars = len(names) + len(faults)
    source = _choose_source(store, names) if labels == "auto" else _checked_source(labels)

    look = images.check if decode else images.header
    tasks = ((root + query, name, source, look) for name in names)
    workers = min(workers, len(names))
    scans = list(each(_scan, tasks, workers=workers, total=len(names), name="indexing", unit="tar"))
    classes = _number_labels(scans, classes, store.root, are_names=source == "folder")

    _report(scans, num_tars)
    faults += [fault for result in scans for fault in result.faults]
    scans = [result for result in scans if len(result.records)]
    if faults and not skip_bad:
        return None, faults
    if not scans:
        raise InputError(f"{store.root}: not one sample can be used:\n{first_few(faults)}")
    write_skipped(folder, faults)
    is_beside = store.is_local and folder.resolve() == Path(store.root).resolve()
    tars = None if is_beside else str(Path(store.root).resolve()) if store.is_local else store.root
    manifest = Manifest.of(classes, [_write_index(result, folder) for result in scans], tars)
    _keep_query(folder / TARS_QUERY, query)
    files.write(folder / MANIFEST, manifest.encode())
    return manifest, faults


def _split(root: str) -> tuple[str, str, list[str]]:
    """The folder or URL, the query that signs it, and the tars in it where `root` names them."""
    address, query = split_query(root)
    if not address.endswith(".tar") or Path(address).is_dir():
        return address, query, []
    folder = address.partition("{")[0].rpartition("/")[0]
    try:
        names = list(braceexpand(address[len(folder) + 1 if folder else 0 :]))
    except ValueError as error:
        raise InputError(
            f"{redact(address)}: {error}; expected a pattern such as DIR/train-{{000..146}}.tar"
        ) from error
    return folder or ".", query, list(map(unquote, names)) if is_http(address) else names


def _keep_query(path: Path, query: str) -> None:
    """Write what signs the tars' URLs where training finds it and nobody else may read it."""
    path.unlink(missing_ok=True)
    if query:
        path.touch(mode=0o600)
        path.write_text(f"{query}\n")


def _report(scans: list[Scan], num_tars: int) -> None:
    """Report how many tars and files there are and which can be used, and tars that are the same."""
    usable = [result for result in scans if result.keys]
    num_files = sum(result.num_members for result in scans)
    num_ignored = sum(result.num_ignored for result in scans)
    num_usable = sum(sum(result.num_parts) for result in usable)
    num_samples = sum(len(result.keys) for result in usable)
    print(
        f"found {num_tars} tars with {num_files} files; "
        f"usable: {len(usable)} tars with {num_usable} files of {num_samples} samples; "
        f"refused: {num_tars - len(usable)} tars, {num_files - num_usable - num_ignored} files; "
        f"ignored: {num_ignored} files that are hidden, of a system or without extension",
        file=sys.stderr,
    )
    first: dict[str, str] = {}
    copies = [one.name for one in usable if first.setdefault(one.sha256, one.name) != one.name]
    if copies:
        shown = ", ".join(copies[:SHOWN])
        print(f"warning: these tars repeat others, so their samples count more than once: {shown}", file=sys.stderr)


def _output_folder(store: Store, root: str, out: Path | None) -> Path:
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


def _find(store: Store) -> list[str]:
    """The tars below the store's root, compressed ones too."""
    try:
        names = [name for name in store.names() if name.endswith((".tar", *_COMPRESSIONS))]
    except OSError as error:
        raise InputError(f"{store.root}: cannot be listed: {error.strerror}") from error
    if not names:
        raise InputError(f"{store.root}: no .tar files below it")
    return names


def _check_names(names: list[str]) -> tuple[list[str], list[SampleFault]]:
    """The tars that can be read, and faults for the others."""
    good, faults = [], []
    for name in names:
        try:
            below_root(name)
        except InputError as error:
            faults.append(SampleFault(name, None, f"{error}: rename it"))
            continue
        if name.endswith(_COMPRESSIONS):
            faults.append(SampleFault(name, None, "compressed, so no sample can be read by itself: decompress it"))
        else:
            good.append(name)
    return good, faults


def _choose_source(store: Store, names: list[str]) -> str:
    """Where labels are, from the first sample that can be read."""
    for name in names:
        try:
            with store.open(name) as stream:
                sample = next(samples(Reader(stream), []))
        except (OSError, TarError, StopIteration):
            continue
        fields = ""
        if "cls" in sample.members:
            source = "cls"
        elif sample.key.removeprefix("./").count("/"):
            source = "folder"
        else:
            with contextlib.suppress(ValueError, RecursionError):
                tree = json.loads(sample.data.get("json", b""))
                fields = ", ".join(tree) if isinstance(tree, dict) else ""
            raise InputError(
                f"{store.url(name)}: no label can be seen in the first sample, {sample.key!r} with parts "
                f"{', '.join(sample.members)}: give --labels json:FIELD"
                + (f", where FIELD is one of {fields}" if fields else " or tars with .cls parts")
            )
        print(f"labels: {source}, after the first sample {sample.key!r}; --labels overrides this", file=sys.stderr)
        return source
    return "cls"


def _checked_source(labels: str) -> str:
    if labels not in ("cls", "folder") and not re.fullmatch("json:.+", labels):
        raise InputError(f"--labels {labels}: expected auto, cls, folder or json:FIELD")
    return labels


def _scan(task: tuple[str, str, str, Callable[[bytes], images.Header]]) -> Scan:
    root, name, source, look = task
    try:
        with _store(root).open(name) as stream:
            result = scan_tar(stream, name, source, look)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        result = Scan(name, 0, "", np.empty(0, RECORD), [], [], [SampleFault(name, None, reason)])
    advance()
    return result


@functools.cache
def _store(root: str) -> Store:
    return Store(root)


def _number_labels(scans: list[Scan], given: list[str] | None, where: str, *, are_names: bool) -> list[str]:
    """Change the records' labels to positions in the class list, which is returned. Drops samples that have no class.

    Labels are numbers where most samples' are, unless `are_names`. Raises InputError where they count from 1 and
    `given` from 0.
    """
    counts: Counter[str] = Counter()
    for result in scans:
        samples_of = np.bincount(result.records["label"], minlength=len(result.labels))
        counts.update(dict(zip(result.labels, map(int, samples_of), strict=True)))
    counts = +counts  # without labels whose samples have all been dropped
    numbers = {text: int(text) for text in counts if is_number(text)}
    if are_names or 2 * sum(counts[text] for text in numbers) <= counts.total():
        classes = given or sorted(counts)
        positions = {name: number for number, name in enumerate(classes)}
    else:
        classes = given or numbered([number for number in numbers.values() if number < MAX_CLASSES], where)
        position_of = {int(name): position for position, name in enumerate(classes) if is_number(name)}
        if not position_of:
            check_first(numbers.values(), len(classes), where)
            position_of = {position: position for position in range(len(classes))}
        positions = {text: position_of[number] for text, number in numbers.items() if number in position_of}
    for result in scans:
        label_of = np.array([positions.get(text, -1) for text in result.labels], np.int32)
        texts = [result.labels[label] for label in result.records["label"]]
        result.records["label"] = label_of[result.records["label"]]
        result.drop(
            {
                int(row): f"label {texts[row]!r} is none of the {len(classes)} classes"
                for row in np.flatnonzero(result.records["label"] < 0)
            }
        )
    return classes


def _write_index(result: Scan, folder: Path) -> Shard:
    name = result.name.removesuffix(".tar")
    buffer = io.BytesIO()
    np.save(buffer, result.records, allow_pickle=False)
    path = folder / f"{name}.index.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, buffer.getvalue())
    return Shard(
        name=name,
        samples=len(result.records),
        bytes=result.bytes,
        sha256=result.sha256,
        index_bytes=buffer.tell(),
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
