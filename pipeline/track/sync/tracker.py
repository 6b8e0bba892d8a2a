"""What training tells of itself to MLflow, without waiting for it.

    loop ──on_step, on_evaluation, on_checkpoint──▶ Tracker: wakes ──▶ its thread: Mirror.sync() ──▶ server

What happened is in the run's folder by then, and is taken from there. Importing this does not import MLflow, which
takes seconds: the thread does.
"""

import importlib.metadata
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import lease
from pipeline.errors import ExternalError, InputError
from pipeline.track.sync.record import RECORD, Record, Status

if TYPE_CHECKING:
    from pipeline.track.sync.mirror import Mirror

PACE_S, IDLE_S = 1.0, 5.0
"""Shortest and longest rest between passes."""
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
AWAITED_RETRY_S = 2.0
"""Longest rest after a failure while the job waits for the server."""


class Tracker:
    """A listener on rank 0 that keeps MLflow's copy of the run's folder up to date, from a thread of its own.

    Whatever happens to the server or to the thread is said on standard error and is no reason for training to stop.
    """

    def __init__(self, folder: Path, patience_s: float) -> None:
        """`folder` has its run.json and config.yaml. `patience_s`: the longest that the end of the run is held up."""
        self._folder, self._patience_s = folder, patience_s
        self._mirror: Mirror | None = None
        self._news = threading.Event()
        self._turn = threading.Condition()
        self._asked = self._answered = self._failed = 0  # numbers of flushes
        self._over = False
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        """MLflow's name for the run; None as long as no server has given it one."""
        return self._mirror.run_id if self._mirror else None

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._news.set()

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._news.set()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._news.set()

    def flush(self, patience_s: float | None = None) -> bool:
        """Wait until a whole pass has been made from now on. False if none has, when patience is over."""
        patience_s = self._patience_s if patience_s is None else patience_s
        began = time.monotonic()
        with self._turn:
            self._asked += 1
            asked = self._asked
            self._news.set()
            self._turn.notify_all()
            self._turn.wait_for(lambda: max(self._answered, self._failed) >= asked, patience_s)
            complete = self._answered >= asked
        if not complete:  # once is enough
            self._patience_s = max(AWAITED_RETRY_S, self._patience_s - (time.monotonic() - began))
        return complete

    def end(self, status: Status, patience_s: float | None = None) -> bool:
        """Note how the run has ended and wait until the server has everything. False if it has not, when patience is
        over; the folder still holds what is missing."""
        Record.read(self._folder).end(self._folder, status)
        complete = self.flush(patience_s)
        self._over = True
        self._news.set()
        if not complete:
            _say(f"not everything is sent; python launch/registry.py sync {self._folder} sends the rest")
        return complete

    def _work(self) -> None:
        troubled, retry_s = False, 0.0
        while not self._over:
            asked, failed = self._asked, False
            self._news.clear()
            try:
                self._sync()
            except ExternalError as error:
                if not troubled and not self._over:
                    _say(f"{error}; nothing is lost: {self._folder} has it all, and it is sent later")
                retry_s = min(max(FIRST_RETRY_S, 2 * retry_s), LAST_RETRY_S)
                troubled = True
            except Exception:
                if not troubled:
                    _say(f"{traceback.format_exc()}training goes on, and {self._folder} has all that is not sent")
                retry_s = LAST_RETRY_S
                troubled = failed = True
            else:
                if troubled:
                    _say("works again; what had piled up is sent")
                troubled, retry_s = False, 0.0
            with self._turn:
                if failed:
                    self._failed = asked
                elif not troubled:
                    self._answered = asked
                self._turn.notify_all()
            self._rest(retry_s, asked)

    def _sync(self) -> None:
        from pipeline.track.sync.mirror import Mirror

        self._mirror = self._mirror or Mirror(self._folder)
        self._mirror.sync()

    def _rest(self, retry_s: float, asked: int) -> None:
        """Until there is something to do. A flush cuts it short."""
        with self._turn:
            if retry_s and self._answered < self._asked:
                retry_s = min(retry_s, AWAITED_RETRY_S)
            self._turn.wait_for(lambda: self._asked > asked or self._over, retry_s or PACE_S)
        if not retry_s:
            self._news.wait(IDLE_S)


def record_failure(folder: Path, patience_s: float = 10.0) -> None:
    """Note of a run that has been given up that it FAILED, and wait so long for the server to have everything.

    For who starts a run's processes, once none of them is left. What cannot be done is said and no error. A run that
    has said itself how it ended stays as it is, and so does one that another job is at work in.
    """
    if not (folder / RECORD).exists():  # it has never begun
        return
    try:
        with lease.hold(folder):
            status = Record.read(folder).status
            tracker = Tracker(folder, patience_s)
            if status in ("RUNNING", "KILLED"):
                tracker.end("FAILED")
            else:
                tracker.flush()
    except BlockingIOError:
        _say(f"{folder}: a job is at work in it: not noted as failed")
    except (InputError, OSError) as error:
        _say(f"{folder}: not noted as failed: {error}")


def packages() -> str:
    """Installed packages, a line name==version each, sorted."""
    installed = {f"{found.name}=={found.version}\n" for found in importlib.metadata.distributions()}
    return "".join(sorted(installed, key=str.lower))


def _say(message: str) -> None:
    print(f"MLflow: {message}", file=sys.stderr, flush=True)
