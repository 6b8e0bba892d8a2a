"""Look at a run's checkpoints and check them.

python launch/checkpoint.py list RUN                 what there is, at a glance
python launch/checkpoint.py verify RUN [--step N]    every byte, and whether everything that belongs to it is there
python launch/checkpoint.py show RUN [--step N]      what the newest whole one, or that of step N, holds

RUN is a run's folder, runs/NAME, or one checkpoint in it, runs/NAME/checkpoints/step-00001200. A run may be at work in
the folder. Verify fails where a checkpoint is damaged, and where none is whole; what a killed save has left is told.
"""

import contextlib
import math
import re
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.cli import Subcommand
from pipeline.errors import InputError
from pipeline.train import checkpoint_files
from pipeline.train.checkpoint_files import COMMIT, FORMAT, step_of
from pipeline.train.meters import finite_or_none


def main() -> dict[str, Any]:
    return cli.choose("launch/checkpoint.py", "Look at a run's checkpoints and check them.", SUBCOMMANDS)


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/NAME, or one checkpoint's")


def _add_run_and_step(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step alone")


def _list(arguments: Namespace) -> dict[str, Any]:
    rows = list(_still_there(_checkpoints(arguments.run), _row))
    print(_table(rows), file=sys.stderr)
    newest = max((row["step"] for row in rows if row["state"] == "whole?"), default=None)
    return {"run": str(arguments.run), "checkpoints": rows, "newest": newest}


def _row(folder: Path) -> dict[str, Any]:
    state, fault = _judge(
        folder, lambda: checkpoint_files.size_fault(folder) or checkpoint_files.state_fault(folder), sound="whole?"
    )
    readable = state == "whole?"
    return {
        **_place(folder),
        "state": state,
        "fault": fault,
        "skipped": checkpoint_files.read_document(folder)["state"]["skipped"] if readable else None,
        "scores": _json_scores(checkpoint_files.scores_of(folder)) if readable else None,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'step':>9}  {'state':12}  {'size':>11}  {'saved':25}  {'skipped':>7}  scores"]
    for row in rows:
        skipped = "" if row["skipped"] is None else row["skipped"]
        line = f"{row['step']:9}  {row['state']:12}  {_size(row['bytes']):>11}  {row['saved'] or '':25}  {skipped:>7}  "
        lines.append((line + (row["fault"] or _told(row["scores"] or {}))).rstrip())
    return "\n".join([*lines, "whole?: committed, and files have the sizes listed; verify compares their bytes too"])


def _verify(arguments: Namespace) -> dict[str, Any]:
    rows = list(_still_there(_checkpoints(arguments.run, arguments.step), _verified))
    states = {row["state"] for row in rows}
    ok = "whole" in states and states <= {"whole", "uncommitted"}
    return {"run": str(arguments.run), "ok": ok, "checkpoints": rows}


def _verified(folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    state, fault = _judge(
        folder, lambda: checkpoint_files.damage(folder) or checkpoint_files.misfit(folder), sound="whole"
    )
    untrained = checkpoint_files.untrained(folder) if state == "whole" else None
    row = {**_place(folder), "state": state, "fault": fault, "untrained": untrained}
    details = f": {fault}" if fault else f", {_size(row['bytes'])}, {time.perf_counter() - start:.1f} s"
    if untrained:
        details += f"; without moments, as only buffers and frozen parameters should be: {', '.join(untrained)}"
    print(f"{folder.name} {state}{details}", file=sys.stderr, flush=True)
    return row


def _show(arguments: Namespace) -> dict[str, Any]:
    folders = _checkpoints(arguments.run, arguments.step)
    folder = next(filter(checkpoint_files.is_whole, reversed(folders)), None)
    if folder is None:
        raise InputError(f"{arguments.run}: no whole checkpoint to show, of {_steps(map(step_of, folders))}")
    if fault := checkpoint_files.misfit(folder):
        raise InputError(f"{folder}: {fault}")
    result = {"run": str(arguments.run), **_place(folder), **_contents(folder)}
    print(_description(result), file=sys.stderr)
    return result


def _contents(folder: Path) -> dict[str, Any]:
    document = checkpoint_files.read_document(folder)
    state = document["state"]
    model, _, _ = checkpoint_files.headers(folder)
    untrained = checkpoint_files.untrained(folder)
    return {
        **{name: state[name] for name in ("skipped", "adam_steps", "ema_steps", "loss_scale", "run_id")},
        "guard": _guard(state["guard"]) if state["guard"] else None,
        "scores": _json_scores(state["scores"]),
        "scored_step": state["scored_step"],
        "identity": document["identity"],
        "tensors": len(model),
        "parameters": sum(math.prod(shape) for name, shape in model.items() if name not in untrained),
        "untrained": untrained,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def _guard(saved: dict[str, Any]) -> dict[str, Any]:
    losses = saved["losses"]
    return {
        "rollback_steps": saved["rollback_steps"],
        "skipped_in_a_row": saved["skipped_in_a_row"],
        "safe_step": saved["safe_step"],
        "window": len(losses),
        "window_loss": statistics.fmean(losses) if losses else None,
    }


def _description(result: dict[str, Any]) -> str:
    scale, guard, rollbacks = result["loss_scale"], result["guard"], "none"
    if guard and guard["rollback_steps"]:
        rollbacks = f"{len(guard['rollback_steps'])}, at {_steps(guard['rollback_steps'])}"
    usual = f"mean loss {guard['window_loss']:.4g} of {guard['window']} steps" if guard and guard["window"] else "empty"
    rows = {
        "saved": result["saved"],
        "step": f"{result['step']}, of which {result['skipped']} skipped",
        "adam_steps": result["adam_steps"],
        "ema_steps": result["ema_steps"],
        "loss scale": f"{scale['value']:g}, {scale['good_steps']} good steps" if scale else "none",
        "rollbacks": rollbacks,
        "guard's window": usual,
        "scores": f"{_told(result['scores'])} at step {result['scored_step']}" if result["scores"] else "none yet",
        "run id": result["run_id"] or "none",
        "model": f"{result['tensors']:,} tensors, {result['parameters']:,} parameters"
        + (f", {len(result['untrained'])} tensors without moments" if result["untrained"] else ""),
        **{f"identity.{name}": value for name, value in result["identity"].items()},
        **{name: _size(size) for name, size in result["files"].items()},
    }
    return "\n".join([result["folder"], *(f"  {name:27}{value}" for name, value in rows.items())])


SUBCOMMANDS = {
    "list": Subcommand("list a run's checkpoints, by their names and sizes alone", _add_run, _list),
    "verify": Subcommand("compare every byte with its digest, and parts with each other", _add_run_and_step, _verify),
    "show": Subcommand("say what a checkpoint holds, the newest whole one by default", _add_run_and_step, _show),
}


def _checkpoints(run: Path, step: int | None = None) -> list[Path]:
    """Folders of checkpoints, committed or not, by step."""
    folder = run.resolve()
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; give a run's folder, runs/NAME, or one checkpoint's")
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    candidates = [folder] if _is_checkpoint(folder) else filter(_is_checkpoint, inside.iterdir())
    found = sorted(candidates, key=step_of)
    if not found:
        raise InputError(f"{run}: no checkpoints in it; give a run's folder, runs/NAME, or one checkpoint's")
    chosen = [folder for folder in found if step in (None, step_of(folder))]
    if not chosen:
        raise InputError(f"{run}: no checkpoint of step {step}; it has {_steps(map(step_of, found))}")
    return chosen


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"step-\d+", path.name) is not None


def _still_there(folders: list[Path], row_of: Callable[[Path], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of those that a run at work does not remove in the meantime: `row_of` raises FileNotFoundError for one."""
    for folder in folders:
        try:
            yield row_of(folder)
        except FileNotFoundError:
            if folder.exists():
                raise
            print(f"{folder.name} has been removed in the meantime", file=sys.stderr, flush=True)


def _judge(folder: Path, find_fault: Callable[[], str | None], *, sound: str) -> tuple[str, str | None]:
    """The state of a checkpoint and, unless it is `sound`, what is wrong."""
    try:
        fault = find_fault()
    except InputError as error:
        fault = str(error)
    if fault is None:
        return sound, None
    if not (folder / COMMIT).exists():
        return "uncommitted", fault
    return "damaged" if checkpoint_files.format_of(folder) in (0, FORMAT) else "other format", fault


def _place(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError for a folder that has gone."""
    num_bytes = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a save at work has renamed it
            num_bytes += path.lstat().st_size
    saved = folder / COMMIT
    return {
        "step": step_of(folder),
        "folder": str(folder),
        "bytes": num_bytes,
        "saved": _iso(saved.stat().st_mtime) if saved.exists() else None,
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _steps(steps: Iterable[int]) -> str:
    named = [str(step) for step in steps]
    return f"step{'s' * (len(named) > 1)} {', '.join(named)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def _told(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'not finite' if score is None else f'{score:.4g}'}" for name, score in scores.items())


def _json_scores(scores: dict[str, float] | None) -> dict[str, float | None] | None:
    return None if scores is None else finite_or_none(scores)
