"""A checkpoint as files: which there are, whether they can be trusted, whether they fit together.

    COMMIT.json ──▶ commit_fault: does it count?
      + sizes   ──▶ size_fault                            at once
      + bytes   ──▶ damage: may a run resume from it?     as fast as SHA-256
    state and tensor headers of one without damage ──▶ misfit: did the save write the right things?

Knows neither torch nor DeepSpeed, so that commands that only look start at once. `checkpoint.py` says what the files
hold.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from pipeline.config import read_json, validated
from pipeline.config.fields import text_matching
from pipeline.errors import InputError
from pipeline.files import open_regular

COMMIT, MODEL, EMA, STATE = "COMMIT.json", "model.safetensors", "ema.safetensors", "state.json"
FORMAT = 2

MOMENTS = ("exp_avg", "exp_avg_sq")

_RANGE = re.compile(r"(.*)\[(\d+):(\d+)\]")

Shape = list[int]


class FileEntry(BaseModel):
    bytes: int
    sha256: str


class Commit(BaseModel):
    """COMMIT.json."""

    format: Literal[2]
    files: dict[Annotated[str, text_matching(r"[\w.-]*\w", "a file's name, without folders")], FileEntry]

    @classmethod
    def read(cls, folder: Path) -> "Commit":
        """Raises OSError and InputError."""
        return read_json(cls, folder / COMMIT)


def commit_fault(folder: Path) -> str | None:
    """Why the checkpoint does not count, or None. Reads COMMIT.json alone.

    Raises InputError for one that a newer version of this code has written, which is not damaged.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        commit = Commit.read(folder)
    except FileNotFoundError:
        return f"no {COMMIT}: saving it did not finish"
    except InputError as error:
        if (found := format_of(folder)) > FORMAT:
            raise InputError(f"{folder}: format {found}, but this version reads format {FORMAT}: update it") from None
        if found in range(1, FORMAT):
            return f"format {found}, but this version reads format {FORMAT}"
        return f"{COMMIT} cannot be read: {str(error).removeprefix(f'{folder / COMMIT}: ')}"
    except OSError as error:
        return f"{COMMIT} cannot be read: {error}"
    if missing := {MODEL, STATE} - commit.files.keys():
        return f"{COMMIT} does not list {', '.join(sorted(missing))}"
    return None


def size_fault(folder: Path) -> str | None:
    """Why the checkpoint cannot be whole, or None where only its bytes could tell. Raises as commit_fault does."""
    if fault := commit_fault(folder):
        return fault
    for name, entry in Commit.read(folder).files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != entry.bytes:
            return f"{name} has {size} bytes, but {COMMIT} lists {entry.bytes}"
    return None


def damage(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None. Reads every byte. Raises as commit_fault does."""
    if fault := commit_fault(folder):
        return fault
    for name, entry in Commit.read(folder).files.items():
        try:
            with os.fdopen(open_regular(folder / name), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if digest != entry.sha256:
            return f"{name} has SHA-256 {digest}, but {COMMIT} lists {entry.sha256}"
    return None


def format_of(folder: Path) -> int:
    """0 if it cannot be read."""
    try:
        found = read_json(dict[str, Any], folder / COMMIT).get("format")
        return found if isinstance(found, int) else 0
    except (OSError, InputError):
        return 0


def is_whole(folder: Path) -> bool:
    """Whether to resume from it. A damaged one is told and walked past: the run repeats the steps since the one
    before."""
    if fault := damage(folder):
        print(f"{folder} is passed over: {fault}", file=sys.stderr, flush=True)
    return fault is None


def misfit(folder: Path) -> str | None:
    """What does not fit together in a checkpoint without damage, or None.

    Its digests tell that it is as it was saved, and this that the right things were: the files of all ranks and no
    others, the folder's own step, and ranges of moments that are each trained tensor exactly once. A tensor without
    any moment is taken for a buffer or a frozen parameter (see `untrained`).
    """
    return _files_misfit(folder) or state_fault(folder) or _tensors_misfit(folder)


def _files_misfit(folder: Path) -> str | None:
    listed = {name: entry.model_dump() for name, entry in Commit.read(folder).files.items()}
    present = {path.name for path in folder.iterdir()}
    ranks = range(max(_count("optimizer-", listed), _count("part-", present)))
    parts = {f"part-{rank}.json" for rank in ranks}
    known = {MODEL, STATE, *(f"optimizer-{rank}.safetensors" for rank in ranks), *listed.keys() & {EMA}}
    if missing := known - listed.keys():
        return f"{COMMIT} does not list {_names(missing)}"
    if strange := listed.keys() - known:
        return f"{COMMIT} lists {_names(strange)}, which is no file of a checkpoint"
    if extra := present - known - parts - {COMMIT}:
        return f"{_names(extra)} should not be there: {COMMIT} does not list it"
    if missing := parts - present:
        return f"{_names(missing)} is missing"
    try:
        written = [read_json(dict[str, Any], folder / part).items() for part in sorted(parts)]
    except (OSError, InputError) as error:
        return f"a part-R.json cannot be read: {error}"
    if dict(entry for part in written for entry in part) != listed:
        return f"the part-R.json files together do not list what {COMMIT} does"
    return None


def state_fault(folder: Path) -> str | None:
    """What is wrong with state.json, or None."""
    try:
        state = read_document(folder)["state"]
        step, ema_steps = state["step"], state["ema_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read: {error!r}"
    if step != step_of(folder):
        return f"{STATE} is of step {step}"
    if ema_steps and not (folder / EMA).exists():
        return f"{STATE} counts {ema_steps} updates of an average, but there is no {EMA}"
    return None


def _tensors_misfit(folder: Path) -> str | None:
    try:
        model, ema, shares = headers(folder)
    except SafetensorError as error:
        return f"a tensor file's header is wrong: {error}"
    if ema not in (None, model):
        return f"{EMA} does not hold the tensors that {MODEL} does"
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)  # by moment and name, of the flattened tensor
    for key, shape in shares:
        match = _RANGE.fullmatch(key)
        if not match or shape != [int(match[3]) - int(match[2])] or match[1].partition(".")[0] not in MOMENTS:
            return f"{key!r} of shape {shape} is no range of a moment"
        ranges[match[1]].append((int(match[2]), int(match[3])))
    trained = {moment_and_name.partition(".")[2] for moment_and_name in ranges}
    if unknown := trained - model.keys():
        return f"{MODEL} does not hold {_names(unknown)}, of which there are moments"
    for name in sorted(trained):
        for moment in MOMENTS:
            if fault := _cover_fault(ranges[f"{moment}.{name}"], math.prod(model[name])):
                return f"{moment}.{name}{fault}"
    return None


def _cover_fault(ranges: list[tuple[int, int]], length: int) -> str | None:
    """Where the ranges are not 0 … length, each value once."""
    end = 0
    for start, stop in [*sorted(ranges), (length, length)]:
        if start > end:
            return f"[{end}:{start}] is missing"
        if stop > length:
            return f"[{start}:{stop}] goes beyond its {length} values"
        if start < end:
            return f"[{start}:{min(end, stop)}] is there twice"
        end = stop
    return None


def _count(prefix: str, names: Iterable[str]) -> int:
    return sum(name.startswith(prefix) for name in names)


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names))


def headers(folder: Path) -> tuple[dict[str, Shape], dict[str, Shape] | None, list[tuple[str, Shape]]]:
    """The shapes of the tensors, by name, in the model, in its average (None: none is kept), and in all ranks' shares
    of the moments, where a name may come twice. Raises SafetensorError for a header that is wrong."""
    shares = [shape for path in sorted(folder.glob("optimizer-*.safetensors")) for shape in _shapes(path).items()]
    return _shapes(folder / MODEL), _shapes(folder / EMA) if (folder / EMA).exists() else None, shares


def _shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise SafetensorError(f"{path.name}: {error}") from None


def untrained(folder: Path) -> list[str]:
    """The model's tensors that have no moments: buffers and frozen parameters, of which nothing in a checkpoint tells
    one from another."""
    model, _, shares = headers(folder)
    trained = {parse_range(key)[0].partition(".")[2] for key, _ in shares}
    return sorted(model.keys() - trained)


def range_key(name: str, moment: str, start: int, length: int) -> str:
    return f"{moment}.{name}[{start}:{start + length}]"


def parse_range(key: str) -> tuple[str, int, int]:
    match = _RANGE.fullmatch(key)
    assert match, f"{key!r} is no range of a moment"
    return match[1], int(match[2]), int(match[3])


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read_document(folder: Path) -> dict[str, Any]:
    """state.json: "format", "identity", "state". Raises OSError and InputError."""
    document = read_json(dict[str, Any], folder / STATE)
    for part in ("identity", "state"):
        validated(dict[str, Any], document.get(part), f"{folder / STATE}: {part}")
    return document


def scores_of(folder: Path) -> dict[str, float] | None:
    """What the evaluation at the checkpoint's own step gave; None without one, or if it cannot be read."""
    try:
        state = read_document(folder)["state"]
        scores = state["scores"] if state["scored_step"] == state["step"] else None
        return scores if isinstance(scores, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def score_of(folder: Path, metric: str) -> float | None:
    """What makes the checkpoint better than others; None where any of its scores is not finite."""
    scores = scores_of(folder) or {}
    return scores.get(metric) if all(map(math.isfinite, scores.values())) else None


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
