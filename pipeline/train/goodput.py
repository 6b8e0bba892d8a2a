"""Where a run's wall time went, over all its processes.

    goodput.json ──▶ Goodput ◀──spend, step── loop
         ▲              │
         └────save──────┴──report, summary──▶ metrics, log

The wall time is that since the first process started, and every second of it counts once: in one of the categories, or
as "other". What a killed process did after its last save cannot be distinguished from the time until its successor
started, and both are "down".
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from pipeline import files
from pipeline.config import read_json
from pipeline.errors import InputError

log = logging.getLogger(__name__)

Category = Literal[
    "compute",  # of steps done for the first time, and not taken back since
    "start_up",
    "data_wait",
    "checkpoint_stall",
    "evaluation",
    "checks",
    "rollback",  # going back, and the compute of steps that were taken back
    "replayed",  # compute of steps that an earlier process had done too
    "down",  # from the last sign of life of a process to the start of the next
]

Seconds = Annotated[float, Field(ge=0.0)]


class _Account(BaseModel):
    """goodput.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    began: float  # when the first process started, seconds since 1970
    last: float  # when this was written
    step: int = 0  # where the run was then; for those who read the file
    restarts: int = 0
    reached: int  # the newest step in here, but for those taken back
    computed: Annotated[int, Field(ge=0)] = 0  # number of steps that "compute" holds
    seconds: dict[Category, Seconds] = {}


class Goodput:
    def __init__(
        self, path: Path | None, *, resumed_step: int, process_start: float, clock: Callable[[], float] = time.time
    ) -> None:
        """Goes on with the account in `path`. The time since `process_start` (seconds since 1970) is start-up.

        `path` is runs/NAME/goodput.json, or None on ranks that keep no file. A file that is missing though steps were
        done, or that cannot be read, is reported, and the account starts with this process.
        """
        self._path = path
        self._clock = clock
        self._nested_s = 0.0
        """The time that has been booked inside the innermost open `spend`, which does not count there again."""
        self._save_failed = False
        account = _read_account(path, resumed_step)
        if account:
            account.restarts += 1
        self._account = account or _Account(began=process_start, last=process_start, reached=resumed_step)
        self._step = resumed_step
        self._book("down", process_start - self._account.last)
        self._book("start_up", clock() - process_start)

    @property
    def restarts(self) -> int:
        return self._account.restarts

    @contextlib.contextmanager
    def spend(self, category: Category) -> Iterator[None]:
        """Books the time inside. Where two are nested, the inner one's time counts for that category alone."""
        began, outer_s = self._clock(), self._nested_s
        self._nested_s = 0.0
        try:
            yield
        finally:
            elapsed_s = self._clock() - began
            self._book(category, elapsed_s - self._nested_s)
            self._nested_s = outer_s + elapsed_s

    def step(self, step: int, seconds: float) -> None:
        """Books a step's compute, without what `spend` booked meanwhile. `step` is 1 for the first step."""
        self._step = step
        self._nested_s += seconds
        if step > self._account.reached:
            self._account.reached = step
            self._account.computed += 1
            self._book("compute", seconds)
        else:
            self._book("replayed", seconds)

    def take_back(self, step: int) -> None:
        """Moves the compute of the steps after `step`, which a rollback has undone, at the mean time of a step.

        Call it after the last of them was booked, whether they are done again or skipped.
        """
        account = self._account
        # An earlier process has booked this rollback, and this one replays it.
        if self._step < account.reached:
            return
        lost = min(account.reached - step, account.computed)
        if lost > 0:
            compute_s = account.seconds.get("compute", 0.0)
            account.seconds["compute"] = compute_s * (account.computed - lost) / account.computed
            self._book("rollback", compute_s - account.seconds["compute"])
            account.computed -= lost
        account.reached = step

    def save(self, step: int) -> None:
        """Rewrites the file, which is also this process's sign of life. Does not raise where the disk fails."""
        self._account.step = step
        self._account.last = self._clock()
        if self._path is None:
            return
        # Not synced: a power cut can only cost the account of the time, and syncing a busy disk would stall the loop.
        try:
            files.replace(self._path, self._account.model_dump_json() + "\n")
        except OSError as error:
            if not self._save_failed:
                log.warning(f"{self._path} cannot be written: {error.strerror}")
            self._save_failed = True

    def report(self) -> dict[str, float]:
        """Returns `ettr`, and the seconds by category as `compute_s` and so on, which add up to the wall time.

        ettr is the effective training time ratio: time in steps that count, over all wall time, down time included,
        as Kokolis et al. 2024 (arXiv 2410.21680, section on ETTR) and ByteRobust (arXiv 2509.16293) define it.
        """
        seconds: dict[str, float] = {}
        for name in get_args(Category):
            seconds[name] = self._account.seconds.get(name, 0.0)
        # The rest is below zero only if a clock was set back, or differs between nodes.
        elapsed_s = self._clock() - self._account.began
        seconds["other"] = max(0.0, elapsed_s - sum(seconds.values()))
        wall_s = sum(seconds.values())
        ettr = seconds["compute"] / wall_s if wall_s else 0.0
        report = {"ettr": ettr}
        for name, value in seconds.items():
            report[f"{name}_s"] = value
        return report

    def summary(self) -> str:
        """Returns one line for the log, the largest loss first."""
        report = self.report()
        ettr = report.pop("ettr")
        wall_s = sum(report.values()) or 1.0
        del report["compute_s"]
        losses = []
        for name, seconds in sorted(report.items(), key=lambda item: -item[1]):
            share = seconds / wall_s
            if share >= 0.0005:
                category = name.removesuffix("_s").replace("_", " ")
                losses.append(f"{category} {share:.1%}")
        listed = ", ".join(losses) or "nothing lost"
        restarts = "1 restart" if self.restarts == 1 else f"{self.restarts} restarts"
        return f"effective training time {ettr:.1%}: {listed}, over {restarts}"

    def _book(self, category: Category, seconds: float) -> None:
        known = self._account.seconds
        # Seconds are below zero where a clock was set back.
        known[category] = known.get(category, 0.0) + max(0.0, seconds)


def _read_account(path: Path | None, resumed_step: int) -> _Account | None:
    if path is None:
        return None
    try:
        return read_json(_Account, path)
    except FileNotFoundError:
        if resumed_step == 0:
            return None
        fault = "no such file"
    except OSError as error:
        fault = error.strerror or str(error)
    except InputError as error:
        fault = str(error).removeprefix(f"{path}: ")
    log.warning(f"{path}: {fault}; the account of time starts here")
    return None
