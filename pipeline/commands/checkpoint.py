"""Lists, verifies and shows a run's checkpoints.

python launch/checkpoint.py list RUN                 all checkpoints, by their names and sizes
python launch/checkpoint.py verify RUN [--step N]    every byte, and whether all files that belong together are there
python launch/checkpoint.py show RUN [--step N]      the contents of the newest whole checkpoint, or that of step N

RUN is a run's folder, runs/NAME, or one checkpoint in it, runs/NAME/checkpoints/step-00001200. The run may be active.
Verify fails where a checkpoint is damaged, and where none is whole; the remains of a killed save are reported.
"""

import contextlib
import logging
import math
import re
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.cli import Subcommand
from pipeline.commands.text_table import align_columns, list_values
from pipeline.errors import InputError
from pipeline.run_folder import CHECKPOINTS, COMMIT
from pipeline.track.metric_names import format_scores
from pipeline.train import checkpoint_files
from pipeline.train.checkpoint_files import FORMAT, step_of
from pipeline.train.meters import finite_or_none

log = logging.getLogger(__name__)

Check = Callable[[Path], str | None]
"""A function that returns what is wrong with a checkpoint, if anything."""


def main() -> dict[str, Any]:
    return cli.choose("launch/checkpoint.py", "List, verify and show a run's checkpoints.", SUBCOMMANDS)


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/NAME, or that of a checkpoint")


def _add_run_and_step(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--step", type=int, metavar="N", help="only the checkpoint of this step")


def _list(arguments: Namespace) -> dict[str, Any]:
    rows = list(_make_rows(_find_checkpoints(arguments.run), _list_row))
    cli.show(_render_table(rows))
    committed = [row["step"] for row in rows if row["state"] == "whole?"]
    return {"run": str(arguments.run), "checkpoints": rows, "newest": max(committed, default=None)}


def _list_row(folder: Path) -> dict[str, Any]:
    checks = (checkpoint_files.size_fault, checkpoint_files.state_fault)
    state, fault = _judge(folder, checks, sound="whole?")
    skipped = None
    scores = None
    if state == "whole?":
        skipped = checkpoint_files.read_document(folder)["state"]["skipped"]
        scores = _json_scores(checkpoint_files.scores_of(folder))
    return {**_describe_folder(folder), "state": state, "fault": fault, "skipped": skipped, "scores": scores}


def _render_table(rows: list[dict[str, Any]]) -> str:
    cells = [("step", "state", "size", "saved", "skipped", "scores")]
    for row in rows:
        cells.append(
            (
                str(row["step"]),
                row["state"],
                _format_size(row["bytes"]),
                row["saved"] or "",
                "" if row["skipped"] is None else str(row["skipped"]),
                row["fault"] or format_scores(row["scores"] or {}),
            )
        )
    lines = align_columns(cells, right=(0, 2, 4))
    lines.append("whole?: committed, and files have the sizes listed; verify compares their bytes too")
    return "\n".join(lines)


def _verify(arguments: Namespace) -> dict[str, Any]:
    rows = list(_make_rows(_find_checkpoints(arguments.run, arguments.step), _verify_row))
    states = {row["state"] for row in rows}
    # The remains of a killed save are no fault: the next start of the run removes them.
    ok = "whole" in states and states <= {"whole", "uncommitted"}
    return {"run": str(arguments.run), "ok": ok, "checkpoints": rows}


def _verify_row(folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    checks = (checkpoint_files.damage, checkpoint_files.misfit)
    state, fault = _judge(folder, checks, sound="whole")
    untrained = checkpoint_files.untrained(folder) if state == "whole" else None
    row = {**_describe_folder(folder), "state": state, "fault": fault, "untrained": untrained}
    seconds = time.perf_counter() - start
    details = f": {fault}" if fault else f", {_format_size(row['bytes'])}, {seconds:.1f} s"
    if untrained:
        details += f"; without moments, as only buffers and frozen parameters should be: {', '.join(untrained)}"
    cli.show(f"{folder.name} {state}{details}")
    return row


def _show(arguments: Namespace) -> dict[str, Any]:
    folders = _find_checkpoints(arguments.run, arguments.step)
    # The newest one first. Damaged ones are reported and skipped.
    newest_first = reversed(folders)
    folder = next(filter(checkpoint_files.verify_checkpoint, newest_first), None)
    if folder is None:
        steps = _format_steps(map(step_of, folders))
        raise InputError(f"{arguments.run}: no whole checkpoint to show, of {steps}")
    if fault := checkpoint_files.misfit(folder):
        raise InputError(f"{folder}: {fault}")
    result = {"run": str(arguments.run), **_describe_folder(folder), **_read_contents(folder)}
    cli.show(_describe_contents(result))
    return result


def _read_contents(folder: Path) -> dict[str, Any]:
    document = checkpoint_files.read_document(folder)
    state = document["state"]
    model, _, _ = checkpoint_files.headers(folder)
    untrained = checkpoint_files.untrained(folder)
    num_parameters = 0
    for name, shape in model.items():
        if name not in untrained:
            num_parameters += math.prod(shape)
    return {
        "skipped": state["skipped"],
        "adam_steps": state["adam_steps"],
        "ema_steps": state["ema_steps"],
        "loss_scale": state["loss_scale"],
        "run_id": state["run_id"],
        "guard": _summarise_guard(state["guard"]) if state["guard"] else None,
        "scores": _json_scores(state["scores"]),
        "scored_step": state["scored_step"],
        "identity": document["identity"],
        "tensors": len(model),
        "parameters": num_parameters,
        "untrained": untrained,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def _summarise_guard(saved: dict[str, Any]) -> dict[str, Any]:
    losses = saved["losses"]
    return {
        "rollback_steps": saved["rollback_steps"],
        "skipped_in_a_row": saved["skipped_in_a_row"],
        "safe_step": saved["safe_step"],
        "window": len(losses),
        "window_loss": statistics.fmean(losses) if losses else None,
    }


def _describe_contents(result: dict[str, Any]) -> str:
    scale = result["loss_scale"]
    guard = result["guard"]
    rollbacks = "none"
    if guard and guard["rollback_steps"]:
        rollbacks = f"{len(guard['rollback_steps'])}, at {_format_steps(guard['rollback_steps'])}"
    window = "empty"
    if guard and guard["window"]:
        window = f"mean loss {guard['window_loss']:.4g} of {guard['window']} steps"
    scores = "none yet"
    if result["scores"]:
        scores = f"{format_scores(result['scores'])} at step {result['scored_step']}"
    model = f"{result['tensors']:,} tensors, {result['parameters']:,} parameters"
    if result["untrained"]:
        model += f", {len(result['untrained'])} tensors without moments"
    rows = {
        "saved": result["saved"],
        "step": f"{result['step']}, of which {result['skipped']} skipped",
        "adam_steps": result["adam_steps"],
        "ema_steps": result["ema_steps"],
        "loss scale": f"{scale['value']:g}, {scale['good_steps']} good steps" if scale else "none",
        "rollbacks": rollbacks,
        "guard's window": window,
        "scores": scores,
        "run id": result["run_id"] or "none",
        "model": model,
    }
    for name, value in result["identity"].items():
        rows[f"identity.{name}"] = value
    for name, size in result["files"].items():
        rows[name] = _format_size(size)
    return "\n".join(list_values(result["folder"], rows))


SUBCOMMANDS = {
    "list": Subcommand("list a run's checkpoints by their names and sizes", _add_run, _list),
    "verify": Subcommand(
        "compare every byte with its digest, and the files of a checkpoint with each other",
        _add_run_and_step,
        _verify,
    ),
    "show": Subcommand("print the contents of a checkpoint, by default the newest whole one", _add_run_and_step, _show),
}


def _find_checkpoints(run: Path, step: int | None = None) -> list[Path]:
    """Returns the folders of checkpoints, committed or not, by step. Raises InputError where there are none."""
    folder = run.resolve()
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; give a run's folder, runs/NAME, or one checkpoint's")
    # A run's folder, the folder of its checkpoints, or one of these.
    parent = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    candidates = [folder] if _is_checkpoint(folder) else parent.iterdir()
    checkpoints = sorted(filter(_is_checkpoint, candidates), key=step_of)
    if not checkpoints:
        raise InputError(f"{run}: no checkpoints in it; give a run's folder, runs/NAME, or one checkpoint's")
    if step is None:
        return checkpoints
    chosen = [path for path in checkpoints if step_of(path) == step]
    if not chosen:
        raise InputError(f"{run}: no checkpoint of step {step}; it has {_format_steps(map(step_of, checkpoints))}")
    return chosen


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"step-\d+", path.name) is not None


def _make_rows(folders: list[Path], make_row: Callable[[Path], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of checkpoints that an active run does not remove in the meantime: `make_row` raises
    FileNotFoundError for those."""
    for folder in folders:
        try:
            yield make_row(folder)
        except FileNotFoundError:
            if folder.exists():
                raise
            log.info(f"{folder.name} has been removed in the meantime")


def _judge(folder: Path, checks: Iterable[Check], *, sound: str) -> tuple[str, str | None]:
    """Returns the state of a checkpoint and, unless that is `sound`, the first fault that the checks find."""
    fault = None
    try:
        for check in checks:
            fault = fault or check(folder)
    except InputError as error:
        fault = str(error)
    if fault is None:
        return sound, None
    if not (folder / COMMIT).exists():
        return "uncommitted", fault
    # A file whose format cannot be read counts as 0.
    is_known_format = checkpoint_files.format_of(folder) in (0, FORMAT)
    return "damaged" if is_known_format else "other format", fault


def _describe_folder(folder: Path) -> dict[str, Any]:
    """Returns the keys that all results have. Raises FileNotFoundError for a folder that has been removed."""
    num_bytes = 0
    for path in folder.iterdir():
        # An active save renames its files.
        with contextlib.suppress(FileNotFoundError):
            num_bytes += path.lstat().st_size
    commit = folder / COMMIT
    saved = None
    if commit.exists():
        saved = datetime.fromtimestamp(commit.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return {"step": step_of(folder), "folder": str(folder), "bytes": num_bytes, "saved": saved}


def _format_steps(steps: Iterable[int]) -> str:
    numbers = [str(step) for step in steps]
    noun = "steps" if len(numbers) > 1 else "step"
    return f"{noun} {', '.join(numbers)}"


def _format_size(num_bytes: int) -> str:
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e3:,.1f} kB"


def _json_scores(scores: dict[str, float] | None) -> dict[str, float | None] | None:
    return None if scores is None else finite_or_none(scores)
