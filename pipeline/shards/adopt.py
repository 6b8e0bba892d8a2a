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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards.faults import Fault, first_few, write_skipped
from pipeline.shards.index import MANIFEST, MAX_CLASSES, RECORD, Manifest, Shard
from pipeline.shards.labels import check_first, is_number, numbered
from pipeline.shards.parallel import advance, each
from pipeline.shards.scan import Scan, samples, scan
from pipeline.shards.store import Store
from pipeline.shards.tar import Reader, TarError

SHARD_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)*\.tar"
_COMPRESSIONS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def index(
    root: str,
    out: Path | None = None,
    *,
    labels: str = "auto",
    classes: list[str] | None = None,
    skip_bad: bool = False,
    workers: int = 1,
) -> tuple[Manifest | None, list[Fault]]:
    """Index the tars below `root`, a folder or URL; or those that a path with braces names: DIR/train-{000..146}.tar.

    Indices and manifest go beside the tars, or into `out`. `labels` is cls, json:FIELD, folder, or auto, which the
    first sample decides. Labels are names, which are sorted into a class list, or numbers; `classes` fixes the list.

    Returns the manifest and all faults. With faults nothing is written and the manifest is None, unless `skip_bad`
    leaves what is bad out, listed in skipped.jsonl. Raises InputError where nothing can be indexed at all.
    """
    root, names = _split(root)
    store = Store(root)
    folder = _output_folder(store, root, out)
    names, faults = _check_names(names) if names else _check_names(*_find(store))
    source = _choose_source(store, names) if labels == "auto" else _checked_source(labels)

    scans: list[Scan] = []
    seen: dict[str, str] = {}
    tasks = ((root, name, source) for name in names)
    for result in each(_scan, tasks, workers=min(workers, len(names)), total=len(names), name="indexing", unit="tar"):
        keys = [key.removeprefix("./") for key in result.keys]
        result.drop({row: f"a sample of this key is in {seen[key]}" for row, key in enumerate(keys) if key in seen})
        seen |= {key: seen.get(key, result.name) for key in keys}
        scans.append(result)
    classes = _number_labels(scans, classes, store.root, are_names=source == "folder")

    if num_ignored := sum(result.num_ignored for result in scans):
        print(f"ignored {num_ignored} files that are hidden or have no extension", file=sys.stderr)
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
    files.write(folder / MANIFEST, manifest.encode())
    return manifest, faults


def _split(root: str) -> tuple[str, list[str]]:
    """The folder or URL, and the tars in it where `root` names them."""
    if not root.endswith(".tar") or Path(root).is_dir():
        return root, []
    folder = root.partition("{")[0].rpartition("/")[0]
    try:
        return folder or ".", list(braceexpand(root[len(folder) + 1 if folder else 0 :]))
    except ValueError as error:
        raise InputError(f"{root}: {error}; expected a pattern such as DIR/train-{{000..146}}.tar") from error


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


def _find(store: Store) -> tuple[list[str], list[str]]:
    """The tars below the store's root, and compressed ones."""
    names = store.names(".tar")
    compressed = [name for kind in _COMPRESSIONS for name in store.names(kind)]
    if not names and not compressed:
        raise InputError(f"{store.root}: no .tar files below it")
    return names, compressed


def _check_names(names: list[str], compressed: Sequence[str] = ()) -> tuple[list[str], list[Fault]]:
    """The tars that can be read, and faults for the others."""
    faults = [Fault(name, None, "compressed, so no sample can be read by itself: decompress it") for name in compressed]
    good = [name for name in names if re.fullmatch(SHARD_NAME, name)]
    reason = "the name of a shard is made of letters, digits, '-', '_' and '.': rename it"
    faults += [Fault(name, None, reason) for name in names if name not in good]
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
            with contextlib.suppress(ValueError):
                fields = ", ".join(json.loads(sample.data.get("json", b"")))
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


def _scan(task: tuple[str, str, str]) -> Scan:
    root, name, source = task
    try:
        with _store(root).open(name) as stream:
            result = scan(stream, name, source)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        result = Scan(name, 0, "", np.empty(0, RECORD), [], [], [Fault(name, None, reason)], 0)
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
