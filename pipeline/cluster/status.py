"""What is known of a run that SLURM works on: from its files, which its job may be writing, and from SLURM.

    slurm/jobs.json ──ids──▶ squeue ──▶ Job ┐
    slurm/events.jsonl  what the supervisor │
    metrics.jsonl  goodput.json  run.json   ├──▶ Status ──▶ told
    config.yaml  result.json  checkpoints/  ┘
    slurm/log ──▶ tail, follow

Each file costs what it would have told if it is missing, and is named among the faults if it cannot be read. The end of
a line that is being written is no fault.
"""

import dataclasses
import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from pipeline.cluster import slurm
from pipeline.cluster.supervise import FAILURES
from pipeline.config import Length
from pipeline.errors import ExternalError, InputError

Document = dict[str, Any]
Phase = Literal["not started", "waiting", "running", "stopped", "finished", "failed", "lost", "unknown"]

_RECENT = 50
"""Readings, of which there is one every train.log_every, that tell how fast a run is."""
_SWEEP: tuple[Phase, ...] = (
    *("running", "waiting", "not started", "stopped"),
    *("lost", "unknown", "failed", "finished"),
)
"""A sweep is in the first of these that one of its children is in."""
_ERRORS = (*FAILURES, "gave up")
_POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """What SLURM says of one of its jobs."""

    id: str
    state: str
    """SLURM's word, "not in the queue" for a job that it has forgotten, "unknown" where it cannot be asked."""
    reason: str | None = None
    nodes: str | None = None
    left_s: int | None = None
    """Until the time limit."""
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
    """Seconds since 1970."""
    event: str
    """crash or no progress, after which the run is started again; or gave up."""
    message: str


@dataclasses.dataclass(frozen=True)
class Status:
    """None is what is not known, or not yet."""

    run: str
    """Its folder."""
    phase: Phase
    """not started; waiting in the queue to go on; running; stopped with a checkpoint; finished; failed, after the
    supervisor gave up; lost, if its job has gone without a word; unknown, without a job to ask about."""
    job: SlurmJob | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    images_per_second: float | None = None
    loss: float | None = None
    scores: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Of the last evaluation."""
    scored_step: int | None = None
    left_s: float | None = None
    """Of training, at the rate of the last readings, with what came between them."""
    ettr: float | None = None
    restarts: int | None = None
    restarts_without_progress: int = 0
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    last_error: RankError | None = None
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)
    """Nodes that the job leaves out, and why."""
    handoffs: "tuple[Status, ...]" = ()
    children: "tuple[Status, ...]" = ()
    """Of a sweep."""
    faults: tuple[str, ...] = ()

    def document(self) -> Document:
        return dataclasses.asdict(self)


def status(folder: Path) -> Status:
    """Raises InputError for a folder that holds no run."""
    if not any((folder / name).exists() for name in ("slurm", "run.json", "config.yaml")):
        found = "holds neither slurm/ nor run.json" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {found}: give the folder of a run, such as runs/NAME")
    faults: list[str] = []
    submitted = _document(folder / "slurm" / "jobs.json", faults)
    job, handoffs, sweep = submitted.get("job"), _mapping(submitted.get("handoffs")), submitted.get("sweep") or []
    # Of all runs the same run.root, which need not be below the folder that this process was started in.
    followers = {folder.parent / Path(name).name: str(each) for name, each in handoffs.items()}
    members = {folder.parent / Path(name).name: f"{job}_{number}" for number, name in enumerate(sweep)}
    own = str(job) if job and not sweep else None
    jobs = _ask(filter(None, [own, *followers.values(), *members.values()]))
    known = _status(folder, jobs[own] if own else None, faults)
    children = tuple(_status(member, jobs[each], faults) for member, each in members.items())
    phases = {child.phase for child in children} or {known.phase}
    return dataclasses.replace(
        known,
        phase=next(phase for phase in _SWEEP if phase in phases),
        handoffs=tuple(_status(follower, jobs[each], faults) for follower, each in followers.items()),
        children=children,
        faults=tuple(faults),
    )


def _status(folder: Path, job: SlurmJob | None, faults: list[str]) -> Status:
    """Of one run, without those that depend on it."""
    events = _lines(folder / "slurm" / "events.jsonl", faults)
    lines = [line for line in _lines(folder / "metrics.jsonl", faults) if _is_placed(line)]
    readings = [line for line in lines if "images_per_second" in line]
    evaluations = [line for line in lines if "images_per_second" not in line]
    goodput, result = (_document(folder / name, faults) for name in ("goodput.json", "result.json"))
    last = readings[-1] if readings else {}
    scored = evaluations[-1] if evaluations else {}
    step = _number(last.get("step", goodput.get("step")))
    total = _total_steps(folder, faults)
    checkpoint = _newest_checkpoint(folder)
    starts = [event["time"] for event in events if event.get("event") == "start" and _number(event.get("time"))]
    step_s = _recent_step_s(readings, since=max(starts, default=0.0))
    return Status(
        run=str(folder),
        phase=_phase(job, events, result, has_started=bool(starts or readings or checkpoint)),
        job=job,
        step=None if step is None else int(step),
        total_steps=total,
        epoch=_number(last.get("epoch")),
        images_per_second=_number(last.get("images_per_second")),
        loss=_number(last.get("loss")),
        scores={name: _number(value) for name, value in scored.items() if name not in ("step", "time")},
        scored_step=scored.get("step"),
        left_s=max(0.0, (total - step) * step_s) if total and step is not None and step_s else None,
        ettr=_number(result.get("ettr", last.get("ettr"))),
        # A process that ends before its first reading has not come to note that it was there.
        restarts=len(starts) - 1 if starts else goodput.get("restarts"),
        restarts_without_progress=_restarts_without_progress(events, checkpoint and checkpoint[0]),
        checkpoint_step=checkpoint and checkpoint[0],
        checkpoint_age_s=checkpoint and time.time() - checkpoint[1],
        last_error=_last_error(events),
        excluded=_excluded(events),
    )


def _phase(job: SlurmJob | None, events: list[Document], result: Document, *, has_started: bool) -> Phase:
    if result and not result.get("requeue"):
        return "finished"
    if job and job.is_alive:  # and so what has ended before is of no account
        return "running" if job.state in _AT_WORK else "waiting" if has_started else "not started"
    if events and events[-1].get("event") == "gave up":
        return "failed"
    if result:
        return "stopped"
    if not has_started and not events:  # a hand-off whose gate has not been passed has no more to say
        return "not started"
    return "unknown" if job is None or job.state == "unknown" else "lost"


def _total_steps(folder: Path, faults: list[str]) -> int | None:
    """train.length in steps: not written down, and in epochs not known before the run has noted its data's size."""
    config = next((path for path in (folder / "config.yaml", folder / "slurm" / "config.yaml") if path.exists()), None)
    train = _mapping(_document(config, faults).get("train")) if config else {}
    batch = _number(train.get("global_batch_size"))
    inputs = _document(folder / "run.json", faults).get("inputs") or []
    samples = sum(_number(each.get("samples")) or 0 for each in inputs if each.get("context") == "training")
    try:
        length = Length.parse(train.get("length"))
    except ValueError:
        return None
    if not batch or (length.unit == "epochs" and not samples):
        return None
    return length.steps(steps_per_epoch=int(samples // batch), global_batch_size=int(batch))


def _is_placed(line: Document) -> bool:
    return all(_number(line.get(name)) is not None for name in ("step", "time"))


def _recent_step_s(readings: list[Document], *, since: float) -> float | None:
    """Seconds a step of the current attempt took, evaluations and saves included."""
    recent = [line for line in readings[-_RECENT:] if line["time"] >= since]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return _number(readings[-1].get("step_s")) if readings else None
    return (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Step, and when it was committed. Its bytes are not compared."""
    found = []
    for commit in (folder / "checkpoints").glob("step-*/COMMIT.json"):
        try:
            found.append((int(commit.parent.name.removeprefix("step-")), commit.stat().st_mtime))
        except (ValueError, OSError):  # retention removes checkpoints at any moment
            continue
    return max(found, default=None)


def _restarts_without_progress(events: list[Document], checkpoint_step: int | None) -> int:
    failure = next((event for event in reversed(events) if event.get("event") in FAILURES), None)
    if failure is None or (checkpoint_step or 0) > (failure.get("step") or 0):
        return 0
    return int(failure.get("restarts") or 0)


def _last_error(events: list[Document]) -> RankError | None:
    for event in reversed(events):
        message = event.get("error") or event.get("why")
        if event.get("event") in _ERRORS and message:
            return RankError(_number(event.get("time")) or 0.0, event["event"], str(message))
    return None


def _excluded(events: list[Document]) -> dict[str, str]:
    """By the job that spoke last, for another one has other nodes; but for those that have got well since."""
    job = events[-1].get("job") if events else None
    excluded: dict[str, str] = {}
    for event in (each for each in events if each.get("job") == job):
        if event.get("event") == "excluded":
            excluded[str(event.get("node"))] = str(event.get("why"))
        for node in event.get("nodes") or ():
            excluded.pop(node, None)
    return excluded


def _ask(ids: Iterable[str]) -> dict[str, SlurmJob]:
    """By id. SLURM is asked once: answers of one moment, and a busy controller is spared."""
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    fields = "--format=%i|%T|%N|%L|%S|%r"
    try:
        answer = slurm.ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}", fields)
    except (ExternalError, InputError) as error:
        if "Invalid job id" not in str(error):
            return {each: SlurmJob(each, "unknown", str(error)) for each in wanted}
        answer = ""  # what it says of one job alone that it has forgotten; of several it leaves those out
    found = {job.id: job for job in map(_job, answer.splitlines())}
    return {each: found.get(each, SlurmJob(each, "not in the queue")) for each in wanted}


def _job(line: str) -> SlurmJob:
    job, state, nodes, left, start, reason = line.split("|", 5)
    waits, works = state in _WAITING, state in _AT_WORK
    return SlurmJob(
        id=job.strip(),
        state=state,
        reason=None if reason == "None" else reason,
        nodes=nodes or None,
        left_s=slurm.seconds(left) if works else None,
        start=_moment(start) if waits else None,
    )


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()  # in local time, as squeue writes it
    except ValueError:  # N/A
        return None


def _document(path: Path, faults: list[str]) -> Document:
    """A file's JSON or YAML mapping; empty where there is none."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        faults.append(f"{path}: {error}")
        return {}
    if not isinstance(found, dict):
        faults.append(f"{path}: a mapping was expected, not {type(found).__name__}")
    return _mapping(found)


def _lines(path: Path, faults: list[str]) -> list[Document]:
    """A file's JSON objects, one a line, but for a last line without its end."""
    try:
        whole = path.read_text(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{path}: {error.strerror}")
        return []
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(_mapping(json.loads(line)))
        except ValueError:
            faults.append(f"{path}: line {number} is no JSON")
    return [line for line in found if line]


def _mapping(value: Any) -> Document:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def told(known: Status) -> str:
    """A table for people."""
    rows = [(known.phase, _progress(known)), *((name, text) for name, text in _rows(known) if text)]
    width = max(len(name) for name, _ in rows)
    lines = [known.run, *(f"  {name:{width}}  {text}".rstrip() for name, text in rows)]
    for title, others in (("sweep", known.children), ("hands off to", known.handoffs)):
        if others:
            lines += ["", title, *_table(others)]
    return "\n".join([*lines, *(f"cannot be read: {fault}" for fault in known.faults)])


def _progress(known: Status) -> str:
    if known.step is None:
        return ""
    if not known.total_steps:
        return f"step {known.step:,}"
    done = min(1.0, known.step / known.total_steps)
    bar = "━" * int(20 * done) + "╌" * (20 - int(20 * done))
    # Rounded down: 100 % is said of the last step alone.
    return f"{bar}  {math.floor(1000 * done) / 10:.1f} %  step {known.step:,} of {known.total_steps:,}"


def _rows(known: Status) -> list[tuple[str, str]]:
    now = time.time()
    training = [
        "" if known.epoch is None else f"epoch {known.epoch:.2f}",
        "" if known.loss is None else f"loss {known.loss:.4g}",
        "" if known.images_per_second is None else f"{known.images_per_second:,.0f} images/s",
        "" if known.left_s is None or known.phase == "finished" else f"{_duration(known.left_s)} left",
    ]
    rows = [("job", _told_job(known.job, now) if known.job else ""), ("training", "  ".join(filter(None, training)))]
    if known.scores:
        rows.append(("evaluation", f"{_told_scores(known.scores)}  (step {known.scored_step})"))
    if known.checkpoint_step is not None and known.checkpoint_age_s is not None:
        rows.append(("checkpoint", f"step {known.checkpoint_step:,}, {_duration(known.checkpoint_age_s)} ago"))
    if known.restarts or known.restarts_without_progress:
        stuck = known.restarts_without_progress
        rows.append(
            ("restarts", f"{known.restarts or 0}" + (f", {stuck} since the newest checkpoint" if stuck else ""))
        )
    if known.ettr is not None:
        rows.append(("effective time", f"{known.ettr:.1%}"))
    rows += [("excluded", f"{node}: {_one_line(why)}") for node, why in known.excluded.items()]
    if error := known.last_error:
        rows.append(("last error", f"{_duration(now - error.time)} ago, {error.event}: {_one_line(error.message)}"))
    return rows


def _told_job(job: SlurmJob, now: float) -> str:
    parts = [
        f"{job.id}  {job}",
        f"on {job.nodes}" if job.nodes else "",
        "" if job.left_s is None else f"{_duration(job.left_s)} to its time limit",
        "" if job.start is None else f"expected to start in {_duration(job.start - now)}",
    ]
    return "  ".join(filter(None, parts))


def _table(runs: Iterable[Status]) -> list[str]:
    """A line each, in columns."""
    cells = [
        (
            Path(run.run).name,
            run.phase,
            f"{run.job.id} {run.job}" if run.job else "",
            "" if run.step is None else f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""),
            f"{run.images_per_second:,.0f} images/s" if run.images_per_second else "",
            f"loss {run.loss:.4g}" if run.loss is not None else "",
            _told_scores(run.scores),
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[f"{cell:{width}}" for cell, width in zip(row, widths, strict=True) if width] for row in cells]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _told_scores(scores: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in scores.items())


def _one_line(message: str, longest: int = 300) -> str:
    text = " ".join(message.split())
    return text if len(text) <= longest else f"…{text[-longest:]}"  # a traceback's end tells most


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    for unit, size, below, below_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below_size} {below}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def tail(path: Path, lines: int, *, rank: int | None = None) -> list[str]:
    """The last lines of a log, or of one rank's in it. Raises InputError where there is no log."""
    if not path.exists():
        raise InputError(f"{path}: no such log: the job has not started yet, or nothing was submitted")
    return list(follow(path, lambda: True, lines=lines, rank=rank))


def follow(path: Path, until: Callable[[], bool], *, lines: int = 0, rank: int | None = None) -> Iterator[str]:
    """The last `lines` lines and then each as it is written, without its end, until `until` says so: what has been
    written by then still comes. Waits for a log that is not there yet."""
    while not path.exists():
        if until():
            return
        time.sleep(_POLL_S)
    # srun --label puts "RANK: " in front, to the right in a column as wide as the largest rank.
    is_wanted = re.compile(r"" if rank is None else rf"\s*{rank}: ").match
    with path.open("rb") as log:
        log.seek(_last(log, lines, is_wanted))
        rest = b""
        while True:
            ends = until()
            *whole, rest = (rest + log.read()).split(b"\n")
            if ends and rest:
                whole.append(rest)
            yield from (line for line in map(_text, whole) if is_wanted(line))
            if ends:
                return
            time.sleep(_POLL_S)


def _last(log: IO[bytes], lines: int, is_wanted: Callable[[str], object]) -> int:
    """Where the last `lines` lines that are wanted begin; the end if there are none."""
    wanted: deque[int] = deque(maxlen=lines)
    end = 0
    for line in log:
        if is_wanted(_text(line)):
            wanted.append(end)
        end += len(line)
    return wanted[0] if wanted else end


def _text(line: bytes) -> str:
    return line.rstrip(b"\r\n").decode(errors="replace")
