"""A checkpoint as files: which there are, whether they can be trusted, whether they fit together.

    COMMIT.json ──▶ commit_fault: does it count?
      + sizes   ──▶ size_fault                            at once
      + bytes   ──▶ damage: may a run resume from it?     as fast as SHA-256
    state and tensor headers of one without damage ──▶ misfit: did the save write the right things?

This module imports neither torch nor DeepSpeed, so that commands that only look at checkpoints start at once.
`checkpoint.py` describes what the files hold.
"""

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from pipeline import files
from pipeline.config import read_json, validated
from pipeline.config.fields import text_matching
from pipeline.errors import InputError
from pipeline.run_folder import COMMIT

log = logging.getLogger(__name__)

MODEL, EMA, STATE = "model.safetensors", "ema.safetensors", "state.json"
FORMAT = 2

MOMENTS = ("exp_avg", "exp_avg_sq")

_RANGE = re.compile(r"(.*)\[(\d+):(\d+)\]")

Shape = list[int]
Shapes = dict[str, Shape]


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
    """Returns why the checkpoint does not count, or None. Reads COMMIT.json alone.

    Raises InputError for a checkpoint that a newer version of this code has written: that is not damaged.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        commit = Commit.read(folder)
    except FileNotFoundError:
        return f"no {COMMIT}: saving it did not finish"
    except InputError as error:
        return _format_fault(folder, str(error))
    except OSError as error:
        return f"{COMMIT} cannot be read: {error}"
    missing = {MODEL, STATE} - commit.files.keys()
    if missing:
        return f"{COMMIT} does not list {_join(missing)}"
    return None


def _format_fault(folder: Path, error: str) -> str:
    """Returns what is wrong with a COMMIT.json that does not validate."""
    found = format_of(folder)
    mismatch = f"format {found}, but this version reads format {FORMAT}"
    if found > FORMAT:
        raise InputError(f"{folder}: {mismatch}: update it") from None
    if 1 <= found < FORMAT:
        return mismatch
    reason = error.removeprefix(f"{folder / COMMIT}: ")
    return f"{COMMIT} cannot be read: {reason}"


def size_fault(folder: Path) -> str | None:
    """Returns why the checkpoint cannot be whole, or None where only its bytes could show it. Raises as commit_fault
    does."""
    fault = commit_fault(folder)
    if fault:
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
    """Returns why the checkpoint cannot be trusted, or None. Reads every byte. Raises as commit_fault does."""
    fault = commit_fault(folder)
    if fault:
        return fault
    for name, entry in Commit.read(folder).files.items():
        try:
            digest = files.sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if digest != entry.sha256:
            return f"{name} has SHA-256 {digest}, but {COMMIT} lists {entry.sha256}"
    return None


def format_of(folder: Path) -> int:
    """Returns the checkpoint's format, or 0 if it cannot be read."""
    try:
        document = read_json(dict[str, Any], folder / COMMIT)
    except (OSError, InputError):
        return 0
    found = document.get("format")
    return found if isinstance(found, int) else 0


def verify_checkpoint(folder: Path) -> bool:
    """Whether a run can resume from the checkpoint. A damaged one is reported and skipped: the run repeats the steps
    since the one before."""
    fault = damage(folder)
    if fault:
        log.warning(f"{folder} is skipped: {fault}")
    return fault is None


def misfit(folder: Path) -> str | None:
    """Returns what does not fit together in a checkpoint without damage, or None.

    Its digests show that it is as it was saved, and this that the right things were saved: the files of all ranks and
    no others, the folder's own step, and ranges of moments that cover each trained tensor exactly once. A tensor
    without any moment counts as a buffer or a frozen parameter (see `untrained`).
    """
    return _files_misfit(folder) or state_fault(folder) or _tensors_misfit(folder)


def _files_misfit(folder: Path) -> str | None:
    listed = Commit.read(folder).model_dump()["files"]
    present = {path.name for path in folder.iterdir()}
    num_ranks = max(_count("optimizer-", listed), _count("part-", present))
    parts = {f"part-{rank}.json" for rank in range(num_ranks)}
    known = {f"optimizer-{rank}.safetensors" for rank in range(num_ranks)}
    known |= {MODEL, STATE}
    if EMA in listed:
        known.add(EMA)
    missing = known - listed.keys()
    if missing:
        return f"{COMMIT} does not list {_join(missing)}"
    strange = listed.keys() - known
    if strange:
        return f"{COMMIT} lists {_join(strange)}, which is no file of a checkpoint"
    extra = present - known - parts - {COMMIT}
    if extra:
        return f"{_join(extra)} should not be there: {COMMIT} does not list it"
    missing = parts - present
    if missing:
        return f"{_join(missing)} is missing"
    written = {}
    try:
        for part in sorted(parts):
            written |= read_json(dict[str, Any], folder / part)
    except (OSError, InputError) as error:
        return f"a part-R.json cannot be read: {error}"
    if written != listed:
        return f"the part-R.json files together do not list what {COMMIT} does"
    return None


def state_fault(folder: Path) -> str | None:
    """Returns what is wrong with state.json, or None."""
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
        model, ema, moments = headers(folder)
    except SafetensorError as error:
        return f"a tensor file's header is wrong: {error}"
    if ema not in (None, model):
        return f"{EMA} does not hold the tensors that {MODEL} does"
    # Of the flattened tensors, by "MOMENT.NAME".
    ranges = defaultdict[str, list[tuple[int, int]]](list)
    for key, shape in moments:
        if not _is_range_of_moment(key, shape):
            return f"{key!r} of shape {shape} is no range of a moment"
        moment_and_name, start, stop = parse_range(key)
        ranges[moment_and_name].append((start, stop))
    trained = {_name_of(moment_and_name) for moment_and_name in ranges}
    unknown = trained - model.keys()
    if unknown:
        return f"{MODEL} does not hold {_join(unknown)}, of which there are moments"
    # Every trained tensor has both moments, and ranks have shared out each of their values once.
    for name in sorted(trained):
        length = math.prod(model[name])
        for moment in MOMENTS:
            key = f"{moment}.{name}"
            fault = _cover_fault(ranges[key], length)
            if fault:
                return f"{key}{fault}"
    return None


def _is_range_of_moment(key: str, shape: Shape) -> bool:
    if not _RANGE.fullmatch(key):
        return False
    moment_and_name, start, stop = parse_range(key)
    moment, _, _ = moment_and_name.partition(".")
    return moment in MOMENTS and shape == [stop - start]


def _cover_fault(ranges: list[tuple[int, int]], length: int) -> str | None:
    """Returns where the ranges do not cover 0 … `length`, each value once, or None."""
    # The last, empty range stands for the end, to find values that are missing there.
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


def _join(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _name_of(moment_and_name: str) -> str:
    return moment_and_name.partition(".")[2]


def headers(folder: Path) -> tuple[Shapes, Shapes | None, list[tuple[str, Shape]]]:
    """Returns the shapes of the tensors, by name: in the model, in its average (None where none is kept), and in all
    ranks' files of moments, where a name may come twice. Raises SafetensorError for a header that is wrong."""
    moments = []
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        moments += _read_shapes(path).items()
    model = _read_shapes(folder / MODEL)
    has_average = (folder / EMA).exists()
    ema = _read_shapes(folder / EMA) if has_average else None
    return model, ema, moments


def _read_shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise SafetensorError(f"{path.name}: {error}") from None


def untrained(folder: Path) -> list[str]:
    """Returns the model's tensors without moments: buffers and frozen parameters, which nothing in a checkpoint
    distinguishes."""
    model, _, moments = headers(folder)
    trained = set()
    for key, _ in moments:
        moment_and_name, _, _ = parse_range(key)
        trained.add(_name_of(moment_and_name))
    return sorted(model.keys() - trained)


def range_key(name: str, moment: str, start: int, length: int) -> str:
    """Returns the name that a range of a flattened moment has in a file."""
    stop = start + length
    return f"{moment}.{name}[{start}:{stop}]"


def parse_range(key: str) -> tuple[str, int, int]:
    """Returns "MOMENT.NAME", start and stop of a key that `range_key` gave."""
    match = _RANGE.fullmatch(key)
    assert match, f"{key!r} is no range of a moment"
    return match[1], int(match[2]), int(match[3])


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read_document(folder: Path) -> dict[str, Any]:
    """Returns what is in state.json: "format", "identity" and "state". Raises OSError and InputError."""
    document = read_json(dict[str, Any], folder / STATE)
    for section in ("identity", "state"):
        name = f"{folder / STATE}: {section}"
        validated(dict[str, Any], document.get(section), name)
    return document


def scores_of(folder: Path) -> dict[str, float] | None:
    """Returns the scores of the evaluation at the checkpoint's own step; None without one, or if it cannot be read."""
    try:
        state = read_document(folder)["state"]
        if state["scored_step"] != state["step"]:
            return None
        scores = state["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return scores if isinstance(scores, dict) else None


def score_of(folder: Path, metric: str) -> float | None:
    """Returns the score by which checkpoints are compared; None where any of its scores is not finite."""
    scores = scores_of(folder) or {}
    if not all(math.isfinite(score) for score in scores.values()):
        return None
    return scores.get(metric)


def json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    return text.encode()
