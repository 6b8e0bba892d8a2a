"""Sends a run's progress to MLflow without making training wait.

    loop ──on_step, on_evaluation, on_checkpoint──▶ Tracker: wakes ──▶ its thread: Mirror.sync() ──▶ server

By the time of each call the run's folder holds what happened, and the thread sends it from there. Importing this module
does not import MLflow, which takes seconds: the thread does.
"""

import importlib.metadata
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import lease
from pipeline.errors import ExternalError, InputError
from pipeline.run_folder import RECORD
from pipeline.track.sync.record import Record, Status

if TYPE_CHECKING:
    from pipeline.track.sync.mirror import Mirror

log = logging.getLogger(__name__)

PACE_S = 1.0
IDLE_S = 5.0
"""Shortest and longest pause between passes."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
"""Pause after the first failure, and the longest one after several: it doubles each time."""
AWAITED_RETRY_S = 2.0
"""Longest pause after a failure while the job waits for the server."""


class Tracker:
    """A listener on rank 0 that keeps MLflow's copy of the run's folder up to date, in a thread of its own.

    Failures of the server or of the thread are reported on standard error and never stop training.
    """

    def __init__(self, folder: Path, patience_s: float) -> None:
        """`folder` must hold run.json and config.yaml. `patience_s`: the longest that the run's end waits."""
        self._folder = folder
        self._patience_s = patience_s
        self._mirror: Mirror | None = None
        self._news = threading.Event()
        self._turn = threading.Condition()
        # Flushes are numbered: how many were asked for, and the last one that was completed, or that failed.
        self._asked = 0
        self._answered = 0
        self._failed = 0
        self._over = False
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as no server has created it."""
        return self._mirror.run_id if self._mirror else None

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._news.set()

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._news.set()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._news.set()

    def flush(self, patience_s: float | None = None) -> bool:
        """Waits for a complete pass that begins after this call. Returns False if there is none in time."""
        patience_s = self._patience_s if patience_s is None else patience_s
        began = time.monotonic()
        with self._turn:
            self._asked += 1
            asked = self._asked
            self._news.set()
            self._turn.notify_all()
            self._turn.wait_for(lambda: max(self._answered, self._failed) >= asked, patience_s)
            complete = self._answered >= asked
        if not complete:
            # The patience is for all waits together: a server that is down holds up the run's end only once.
            waited_s = time.monotonic() - began
            self._patience_s = max(AWAITED_RETRY_S, self._patience_s - waited_s)
        return complete

    def end(self, status: Status, patience_s: float | None = None) -> bool:
        """Notes how the run ended and waits until the server has everything.

        Returns False if the server does not have it within the patience. The folder still holds what is missing.
        """
        # On disk first: the status is then in the folder, whatever happens to the server.
        Record.read(self._folder).end(self._folder, status)
        complete = self.flush(patience_s)
        self._over = True
        self._news.set()
        if not complete:
            log.warning(f"MLflow: not everything is sent; python launch/registry.py sync {self._folder} sends the rest")
        return complete

    def _work(self) -> None:
        troubled = False
        retry_s = 0.0
        while not self._over:
            # What happens from here on wakes the thread again, so it must be noted before the pass begins.
            asked = self._asked
            failed = False
            self._news.clear()
            try:
                self._sync()
            except ExternalError as error:
                if not troubled and not self._over:
                    log.warning(f"MLflow: {error}; nothing is lost: {self._folder} has it all, and it is sent later")
                retry_s = min(max(FIRST_RETRY_S, 2 * retry_s), LAST_RETRY_S)
                troubled = True
            except Exception:
                if not troubled:
                    log.exception(f"MLflow: training goes on, and {self._folder} has all that is not sent")
                retry_s = LAST_RETRY_S
                troubled = failed = True
            else:
                if troubled:
                    log.info("MLflow: connection restored; the backlog is sent")
                troubled = False
                retry_s = 0.0
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
        begin_s = time.monotonic()
        self._mirror.sync()
        log.debug(f"MLflow: synced {self._folder} in {time.monotonic() - begin_s:.1f} s")

    def _rest(self, retry_s: float, asked: int) -> None:
        """Waits until there is something to do. A flush ends the pause early."""
        with self._turn:
            if retry_s and self._answered < self._asked:
                retry_s = min(retry_s, AWAITED_RETRY_S)
            self._turn.wait_for(lambda: self._asked > asked or self._over, retry_s or PACE_S)
        # Some files change without an event of the loop, so the wait for one is limited.
        if not retry_s:
            self._news.wait(IDLE_S)


def record_failure(folder: Path, patience_s: float = 10.0) -> None:
    """Notes that a run which was given up has FAILED, and waits up to `patience_s` for the server to have everything.

    The process that started a run's processes calls this, once none of them is left. Errors are reported, not raised. A
    run that has noted its own end stays as it is, and so does one whose folder another job is using.
    """
    if not (folder / RECORD).exists():
        # The run never began.
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
        log.warning(f"MLflow: {folder}: a job is at work in it: not noted as failed")
    except (InputError, OSError) as error:
        log.warning(f"MLflow: {folder}: not noted as failed: {error}")


def list_packages() -> str:
    """Returns the installed packages, one name==version a line, sorted."""
    installed = set()
    for package in importlib.metadata.distributions():
        # Once, because each access reads and parses it: of all packages a quarter second.
        metadata = package.metadata
        installed.add(f"{metadata['Name']}=={metadata['Version']}\n")
    return "".join(sorted(installed, key=str.lower))
