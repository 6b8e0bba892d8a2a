"""The status of a run on SLURM as text."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.cluster.status import SlurmJob, Status
from pipeline.commands.text_table import align_columns
from pipeline.track.metric_names import format_scores
from pipeline.value_text import format_duration

_BAR_CHARACTERS = 20


def format_status(status: Status) -> str:
    """Returns a table of a run's status, and of the runs that belong to it."""
    rows = [(status.phase, _format_progress(status)), *_detail_rows(status)]
    lines = [status.run]
    lines += [f"  {line}" for line in align_columns(rows)]
    if status.children:
        lines += ["", "sweep", *_list_runs(status.children)]
    if status.handoffs:
        lines += ["", "hands off to", *_list_runs(status.handoffs)]
    lines += [f"cannot be read: {fault}" for fault in status.faults]
    return "\n".join(lines)


def _format_progress(status: Status) -> str:
    if status.step is None:
        return ""
    if not status.total_steps:
        return f"step {status.step:,}"
    done = min(1.0, status.step / status.total_steps)
    filled = int(_BAR_CHARACTERS * done)
    bar = "━" * filled + "╌" * (_BAR_CHARACTERS - filled)
    # Rounded down, so that only the last step shows 100 %.
    percent = math.floor(1000 * done) / 10
    return f"{bar}  {percent:.1f} %  step {status.step:,} of {status.total_steps:,}"


def _detail_rows(status: Status) -> list[tuple[str, str]]:
    now = time.time()
    rows = []
    if status.job:
        rows.append(("job", _format_job(status.job, now)))
    if training := _format_training(status):
        rows.append(("training", training))
    if status.scores:
        rows.append(("evaluation", f"{format_scores(status.scores)}  (step {status.scored_step})"))
    if status.checkpoint_step is not None and status.checkpoint_age_s is not None:
        age = format_duration(status.checkpoint_age_s)
        rows.append(("checkpoint", f"step {status.checkpoint_step:,}, {age} ago"))
    if status.restarts or status.restarts_without_progress:
        restarts = str(status.restarts or 0)
        if status.restarts_without_progress:
            restarts += f", {status.restarts_without_progress} since the newest checkpoint"
        rows.append(("restarts", restarts))
    if status.ettr is not None:
        rows.append(("effective time", f"{status.ettr:.1%}"))
    for node, why in status.excluded.items():
        rows.append(("excluded", f"{node}: {_shorten(why)}"))
    if error := status.last_error:
        age = format_duration(now - error.time)
        rows.append(("last error", f"{age} ago, {error.event}: {_shorten(error.message)}"))
    return rows


def _format_training(status: Status) -> str:
    values = []
    if status.epoch is not None:
        values.append(f"epoch {status.epoch:.2f}")
    if status.loss is not None:
        values.append(f"loss {status.loss:.4g}")
    if status.images_per_second is not None:
        values.append(f"{status.images_per_second:,.0f} images/s")
    if status.left_s is not None and status.phase != "finished":
        values.append(f"{format_duration(status.left_s)} left")
    return "  ".join(values)


def _format_job(job: SlurmJob, now: float) -> str:
    values = [f"{job.id}  {job}"]
    if job.nodes:
        values.append(f"on {job.nodes}")
    if job.left_s is not None:
        values.append(f"{format_duration(job.left_s)} to its time limit")
    if job.start is not None:
        values.append(f"expected to start in {format_duration(job.start - now)}")
    return "  ".join(values)


def _list_runs(runs: Iterable[Status]) -> list[str]:
    rows = []
    for run in runs:
        job = f"{run.job.id} {run.job}" if run.job else ""
        step = "" if run.step is None else f"step {run.step:,}"
        # The total is not known before the run has recorded the size of its data.
        if step and run.total_steps:
            step += f" of {run.total_steps:,}"
        speed = f"{run.images_per_second:,.0f} images/s" if run.images_per_second else ""
        loss = f"loss {run.loss:.4g}" if run.loss is not None else ""
        rows.append((Path(run.run).name, run.phase, job, step, speed, loss, format_scores(run.scores)))
    return [f"  {line}" for line in align_columns(rows)]


def _shorten(message: str, longest: int = 300) -> str:
    text = " ".join(message.split())
    # The end of a traceback says most.
    return text if len(text) <= longest else f"…{text[-longest:]}"
