"""The status of a run on SLURM: from its files, which its job may be writing, and from SLURM.

    slurm/jobs.json ──ids──▶ squeue ──▶ SlurmJob ┐
    slurm/events.jsonl  the supervisor's journal │
    metrics.jsonl  goodput.json  run.json        ├──▶ Status
    config.yaml  result.json  checkpoints/       ┘

A file that is missing leaves its values out; one that cannot be read is also named among the faults. An incomplete last
line, which is being written, is no fault.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal

from pipeline import run_folder
from pipeline.cluster import slurm
from pipeline.cluster.journal import EVENTS, FAILURES
from pipeline.errors import ExternalError, InputError
from pipeline.run_folder import Document, RunFolder, as_mapping, as_number

Phase = Literal["not started", "waiting", "running", "stopped", "finished", "failed", "lost", "unknown"]

_NUM_RECENT = 50
"""The number of readings, one every train.log_every steps, from which the speed of a run is computed."""
_SWEEP_PHASES: tuple[Phase, ...] = (
    "running",
    "waiting",
    "not started",
    "stopped",
    "lost",
    "unknown",
    "failed",
    "finished",
)
"""The phase of a sweep is the first of these that one of its runs has."""
_ERRORS = (*FAILURES, "gave up")


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """What SLURM reports about one of its jobs."""

    id: str
    state: str
    """SLURM's name of the state, "not in the queue" for a job that it has forgotten, "unknown" where it cannot be
    asked."""
    reason: str | None = None
    nodes: str | None = None
    left_s: int | None = None
    """The time until the time limit."""
    start: float | None = None
    """SLURM's estimate for a job that waits, in seconds since 1970. It changes with the queue."""

    @property
    def is_alive(self) -> bool:
        return self.state in _WAITING or self.state in _AT_WORK

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state


_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_AT_WORK = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"}


@dataclasses.dataclass(frozen=True)
class RankError:
    time: float
    """The time of the error in seconds since 1970."""
    event: str
    """crash or no progress, after which the run is started again; or gave up."""
    message: str


@dataclasses.dataclass(frozen=True)
class Status:
    """The status of a run. None stands for a value that is not known, or not yet."""

    run: str
    """The run's folder."""
    phase: Phase
    """not started; waiting in the queue to continue; running; stopped with a checkpoint; finished; failed, after the
    supervisor gave up; lost, if its job disappeared without an exit event; unknown, without a job to ask about."""
    job: SlurmJob | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    images_per_second: float | None = None
    loss: float | None = None
    scores: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """The scores of the last evaluation."""
    scored_step: int | None = None
    left_s: float | None = None
    """The remaining time of training at the speed of the last readings, evaluations and saves included."""
    ettr: float | None = None
    restarts: int | None = None
    restarts_without_progress: int = 0
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    last_error: RankError | None = None
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)
    """The nodes that the job does not use, and why."""
    handoffs: "tuple[Status, ...]" = ()
    children: "tuple[Status, ...]" = ()
    """The runs of a sweep."""
    faults: tuple[str, ...] = ()

    def document(self) -> Document:
        return dataclasses.asdict(self)


def read_status(folder: Path) -> Status:
    """Returns the status of the run in a folder. Raises InputError for a folder that holds no run."""
    if not any((folder / name).exists() for name in (run_folder.SLURM, run_folder.RECORD, run_folder.CONFIG)):
        found = "holds neither slurm/ nor run.json" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {found}: give the folder of a run, such as runs/NAME")
    run = RunFolder(folder)
    submitted = run.document(f"{run_folder.SLURM}/jobs.json")
    job = submitted.get("job")
    sweep = submitted.get("sweep") or []
    own_id = str(job) if job and not sweep else None
    # All these runs are in the same run.root, which need not be below the folder that this process was started in.
    handoff_ids = {}
    for name, job_id in as_mapping(submitted.get("handoffs")).items():
        handoff_ids[RunFolder(folder.parent / Path(name).name)] = str(job_id)
    sweep_ids = {}
    for number, name in enumerate(sweep):
        sweep_ids[RunFolder(folder.parent / Path(name).name)] = f"{job}_{number}"
    ids = [*handoff_ids.values(), *sweep_ids.values()]
    if own_id:
        ids.insert(0, own_id)
    jobs = _ask_slurm(ids)
    own = _read_run(run, jobs[own_id] if own_id else None)
    children = tuple(_read_run(child, jobs[job_id]) for child, job_id in sweep_ids.items())
    handoffs = tuple(_read_run(child, jobs[job_id]) for child, job_id in handoff_ids.items())
    phases = {child.phase for child in children} or {own.phase}
    phase = next(phase for phase in _SWEEP_PHASES if phase in phases)
    faults = []
    for each in (run, *sweep_ids, *handoff_ids):
        faults += [f"{each.path}/{fault}" for fault in each.faults]
    return dataclasses.replace(own, phase=phase, handoffs=handoffs, children=children, faults=tuple(faults))


def _read_run(run: RunFolder, job: SlurmJob | None) -> Status:
    """Returns the status of one run, without the runs that belong to it."""
    events = run.lines(EVENTS)
    readings, evaluations = run.metrics()
    readings = [line for line in readings if as_number(line.get("time")) is not None]
    goodput = run.document(run_folder.GOODPUT)
    result = run.document(run_folder.RESULT)
    last = readings[-1] if readings else {}
    scored = evaluations[-1] if evaluations else {}
    scores = {name: as_number(value) for name, value in scored.items() if name not in ("step", "time")}
    step = as_number(last.get("step", goodput.get("step")))
    total_steps = run.total_steps()
    checkpoint_step, checkpoint_time = _newest_checkpoint(run) or (None, None)
    starts = [event["time"] for event in events if event.get("event") == "start" and as_number(event.get("time"))]
    has_started = bool(starts or readings) or checkpoint_step is not None
    step_s = _recent_step_s(readings, since=max(starts, default=0.0))
    left_s = None
    if total_steps and step is not None and step_s:
        left_s = max(0.0, (total_steps - step) * step_s)
    return Status(
        run=str(run.path),
        phase=_phase(job, events, result, has_started=has_started),
        job=job,
        step=None if step is None else int(step),
        total_steps=total_steps,
        epoch=as_number(last.get("epoch")),
        images_per_second=as_number(last.get("images_per_second")),
        loss=as_number(last.get("loss")),
        scores=scores,
        scored_step=scored.get("step"),
        left_s=left_s,
        ettr=as_number(result.get("ettr", last.get("ettr"))),
        # The journal comes first: a process that ends before its first reading is missing in goodput.json.
        restarts=len(starts) - 1 if starts else goodput.get("restarts"),
        restarts_without_progress=_restarts_without_progress(events, checkpoint_step),
        checkpoint_step=checkpoint_step,
        checkpoint_age_s=None if checkpoint_time is None else time.time() - checkpoint_time,
        last_error=_last_error(events),
        excluded=_excluded_nodes(events),
    )


def _phase(job: SlurmJob | None, events: list[Document], result: Document, *, has_started: bool) -> Phase:
    if result and not result.get("requeue"):
        return "finished"
    # How an earlier job ended says nothing while there is another one.
    if job and job.is_alive:
        if job.state in _AT_WORK:
            return "running"
        return "waiting" if has_started else "not started"
    if events and events[-1].get("event") == "gave up":
        return "failed"
    if result:
        return "stopped"
    # A hand-off whose gate was not passed has no journal.
    if not has_started and not events:
        return "not started"
    return "unknown" if job is None or job.state == "unknown" else "lost"


def _recent_step_s(readings: list[Document], *, since: float) -> float | None:
    """Returns the mean duration of a step in the current attempt, evaluations and saves included."""
    recent = [line for line in readings[-_NUM_RECENT:] if line["time"] >= since]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return as_number(readings[-1].get("step_s")) if readings else None
    first, last = recent[0], recent[-1]
    return (last["time"] - first["time"]) / (last["step"] - first["step"])


def _newest_checkpoint(run: RunFolder) -> tuple[int, float] | None:
    """Returns the step of the newest checkpoint and the time of its commit."""
    for step, checkpoint in reversed(run.checkpoints().items()):
        # Retention removes checkpoints at any moment.
        with contextlib.suppress(OSError):
            return step, (checkpoint / run_folder.COMMIT).stat().st_mtime
    return None


def _restarts_without_progress(events: list[Document], checkpoint_step: int | None) -> int:
    for event in reversed(events):
        if event.get("event") in FAILURES:
            has_progressed = (checkpoint_step or 0) > (event.get("step") or 0)
            return 0 if has_progressed else int(event.get("restarts") or 0)
    return 0


def _last_error(events: list[Document]) -> RankError | None:
    for event in reversed(events):
        message = event.get("error") or event.get("why")
        if event.get("event") in _ERRORS and message:
            return RankError(as_number(event.get("time")) or 0.0, event["event"], str(message))
    return None


def _excluded_nodes(events: list[Document]) -> dict[str, str]:
    """Returns the nodes that the last job has excluded and not used since, and why."""
    # Other jobs have other nodes.
    job = events[-1].get("job") if events else None
    excluded: dict[str, str] = {}
    for event in events:
        if event.get("job") != job:
            continue
        if event.get("event") == "excluded":
            excluded[str(event.get("node"))] = str(event.get("why"))
        for node in event.get("nodes") or ():
            excluded.pop(node, None)
    return excluded


def _ask_slurm(ids: Iterable[str]) -> dict[str, SlurmJob]:
    """Returns jobs by id."""
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    # One query for all: the answers are of the same moment, and a busy controller is spared.
    fields = "--format=%i|%T|%N|%L|%S|%r"
    try:
        answer = slurm.ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}", fields)
    except (ExternalError, InputError) as error:
        if "Invalid job id" not in str(error):
            return {job_id: SlurmJob(job_id, "unknown", str(error)) for job_id in wanted}
        # squeue fails for a single job that it has forgotten; of several it omits those.
        answer = ""
    jobs = {job_id: SlurmJob(job_id, "not in the queue") for job_id in wanted}
    for job in map(_parse_job, answer.splitlines()):
        if job.id in jobs:
            jobs[job.id] = job
    return jobs


def _parse_job(line: str) -> SlurmJob:
    job, state, nodes, left, start, reason = line.split("|", 5)
    return SlurmJob(
        id=job.strip(),
        state=state,
        reason=None if reason == "None" else reason,
        nodes=nodes or None,
        left_s=slurm.parse_seconds(left) if state in _AT_WORK else None,
        start=_parse_time(start) if state in _WAITING else None,
    )


def _parse_time(text: str) -> float | None:
    try:
        # In local time, as squeue writes it.
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        # N/A
        return None
