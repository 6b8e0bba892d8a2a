"""Damage that any file can take, chosen at random: bytes, JSON trees and text."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

WEIRD_TEXT = (
    "",
    ".",
    "..",
    "/",
    "../../evil",
    "/etc/evil",
    "a" * 300,
    "a" * 5000,
    "\x1b[2J\x1b]0;title\x07",
    "line\nline",
    "return\rback",
    "\u202egnp.exe",
    "-rf",
    "--help",
    "$(touch evil)",
    "`touch evil`",
    "%s%n%d",
    "NUL",
    " ",
    "é猫🙂",
    "file:///etc/passwd",
    "s3://",
    "http://[::1",
    "__class__",
)
WEIRD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[[[]]]],
    {"a": {"b": {}}},
    *WEIRD_TEXT,
)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def some_bytes(rng: Rng, data: bytes) -> bytes:
    """Returns `data` with one to four changes of the kinds that disks, networks and attackers make."""
    for _ in range(int(rng.integers(1, 5))):
        data = pick(rng, _CHANGES)(rng, data)
    return data


def _place(rng: Rng, data: bytes) -> int:
    """Headers are hit as often as the rest."""
    end = len(data) if rng.integers(2) else min(len(data), 600)
    return int(rng.integers(end + 1))


def _flip(rng: Rng, data: bytes) -> bytes:
    if not data:
        return data
    at = min(_place(rng, data), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


def _cut(rng: Rng, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _drop(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 600)) :]


def _repeat(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, data)
    piece = data[at : at + int(rng.integers(1, 600))]
    return data[:at] + piece * int(rng.integers(1, 20)) + data[at:]


def _insert(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _extreme(rng: Rng, data: bytes) -> bytes:
    """Writes a number that lengths and counts overflow at."""
    at, width = _place(rng, data), int(rng.choice([1, 2, 4, 8]))
    value = pick(rng, (0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
    return data[:at] + value.to_bytes(width, pick(rng, ("little", "big"))) + data[at + width :]


def _zeros(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, data)
    size = int(rng.integers(1, 2000))
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


_CHANGES: tuple[Callable[[Rng, bytes], bytes], ...] = (_flip, _flip, _cut, _drop, _repeat, _insert, _extreme, _zeros)


def something_else(rng: Rng, path: Path) -> str:
    """Puts something else in the place of a file. Returns what."""
    data, kind = path.read_bytes(), pick(rng, ("folder", "fifo", "zero", "missing", "loop", "memory", "huge"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "memory":
        path.symlink_to("/proc/self/mem")
    elif kind == "huge":
        path.write_bytes(data)
        os.truncate(path, 1 << 40)
    return kind


def content(root: Path) -> dict[str, bytes | None]:
    """Returns the bytes of each file below a folder by its path; None for what `something_else` has put there."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30
        else None
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def tree(rng: Rng, document: Any) -> Any:
    """Returns a copy of a JSON tree with one to three of its values replaced, removed, doubled or renamed."""
    document = copy.deepcopy(document)
    for _ in range(int(rng.integers(1, 4))):
        parent, key = _spot(rng, document)
        if parent is None:
            return pick(rng, WEIRD_VALUES)
        change = int(rng.integers(6))
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, dict):
            parent[pick(rng, WEIRD_TEXT)] = parent[key]
        elif change == 1:
            parent.append(parent[key])
        elif change == 2 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * -1 + int(rng.integers(-2, 3))
        else:
            parent[key] = copy.deepcopy(pick(rng, WEIRD_VALUES))
    return document


def _spot(rng: Rng, document: Any) -> tuple[Any, Any]:
    """Returns a container somewhere in the tree and one of its keys."""
    parent, key = None, None
    while isinstance(document, dict | list) and document:
        keys = list(document) if isinstance(document, dict) else range(len(document))
        parent, key = document, pick(rng, list(keys))
        document = parent[key]
        if rng.integers(3) == 0:
            break
    return parent, key


def json_text(rng: Rng, document: Any) -> bytes:
    """Returns JSON that is damaged as a tree or as bytes."""
    if rng.integers(3) == 0:
        return some_bytes(rng, json.dumps(document).encode())
    special = int(rng.integers(12))
    if special == 0:
        return b"[" * 100_000 + b"]" * 100_000
    if special == 1:
        return b'{"format": 2, ' + json.dumps(document).encode()[1:]  # a key twice
    if special == 2:
        return json.dumps(document).encode("utf-16")
    return json.dumps(tree(rng, document)).encode()
