"""Saves behind training: it waits while its state is copied to host memory, and for nothing else.

    main thread      save ─ copy ┐           advance ┐              advance: it counts
    every rank's thread          └ write files       │
    rank 0's thread                                  └ commit, remove old ones

What the threads have done is sent to the other ranks with the reduction that every step makes anyway (`progress`, then
`advance`), so that no thread but the main one takes part in a collective. One save is under way at a time; when the
next is due before it has ended, training waits.
"""

import dataclasses
import hashlib
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline import files
from pipeline.errors import FAILED, ExternalError
from pipeline.lease import Lease
from pipeline.train.checkpoint import Checkpoints, Retention, State
from pipeline.train.checkpoint_files import EMA, MODEL, STATE, json_bytes, range_key, step_of
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.snapshot import Snapshot
from pipeline.world import World

log = logging.getLogger(__name__)

_MOST_FAILURES = 3


class SaveError(ExternalError):
    """Checkpoints cannot be saved."""


class Saver:
    """Writes one run's checkpoints. All methods but `progress` are collective."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        retention: Retention,
        engine: Engine,
        ema: Ema | None,
        world: World,
        lease: Lease | None = None,
    ) -> None:
        """`lease` is that of the run's folder, which rank 0 holds."""
        self.checkpoints = checkpoints
        self.retention = retention
        self._world = world
        self._engine = engine
        self._ema = ema
        self._lease = lease
        pin = world.device.type == "cuda"
        self._snapshots: dict[str, Snapshot] = {}
        for name, tensors in self._own_tensors().items():
            self._snapshots[name] = Snapshot(tensors, pin=pin)
        self._writing_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._hashing_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint digest")
        self._writing: Future[None] | None = None
        self._committing: Future[None] | None = None
        self._folder: Path | None = None
        """The checkpoint that is being written."""
        self._failures = 0
        self.newest: Path | None = None
        """The newest whole checkpoint that this process has written or loaded."""

    def save(self, state: State, safe_step: int) -> None:
        """Begins to save, and returns when the state has been copied. Waits for the save before it. All ranks end at
        once where another job has taken over the run's folder.

        Raises SaveError after the third failure in a row.
        """
        self.finish()
        self._require_lease()
        folder = self.checkpoints.path(state.step)
        if folder == self.newest:
            return
        self._copy()
        fault = self._make_folder(state.step) if self._world.is_first else None
        fault = self._world.from_first(fault)
        if fault:
            self._count_failure(folder, fault)
            return
        loss_scale = self._engine.loss_scale
        state = dataclasses.replace(
            state,
            adam_steps=self._engine.adam_steps(),
            ema_steps=self._ema.steps if self._ema else 0,
            loss_scale=dataclasses.asdict(loss_scale) if loss_scale else None,
        )
        contents = {name: snapshot.data() for name, snapshot in self._snapshots.items()}
        if self._world.is_first:
            contents[STATE] = memoryview(self.checkpoints.state_document(state))
        self._folder = folder
        self._safe_step = safe_step
        log.debug(f"{folder}: copied to memory, writing {len(contents)} files in the background")
        self._writing = self._writing_thread.submit(self._write_files, folder, contents)

    def _own_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the contents of the files that this rank writes, by their names. Collective at stage 3."""
        moments = {
            range_key(name, moment, start, values.numel()): values
            for name, moment, start, values in self._engine.fragments()
        }
        tensors = {f"optimizer-{self._world.rank}.safetensors": moments}
        weights = self._engine.weights()
        average = self._ema.weights() if self._ema else None
        if self._world.is_first:
            tensors[MODEL] = weights
        if average and self._world.rank == self._world.size - 1:
            tensors[EMA] = average
        return tensors

    def _require_lease(self) -> None:
        lost = self._lease.lost if self._lease else None
        # Reported before the others hear of it: a launcher ends all ranks as soon as one has ended.
        if lost:
            log.error(lost)
        if self._world.from_first(bool(lost)):
            os._exit(FAILED)

    def _copy(self) -> None:
        tensors = self._own_tensors()
        for name, snapshot in self._snapshots.items():
            snapshot.fill(tensors[name])
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _make_folder(self, step: int) -> str | None:
        """Returns why the checkpoint's folder cannot be made, or None."""
        try:
            self.checkpoints.make(step)
        except OSError as error:
            return str(error)
        return None

    def _write_files(self, folder: Path, contents: dict[str, memoryview]) -> None:
        """Writes this rank's files, and part-R.json with their sizes and digests."""
        written: dict[str, dict[str, Any]] = {}
        for name, data in contents.items():
            # Both release the interpreter's lock, so hashing takes no time beside writing.
            hashing = self._hashing_thread.submit(hashlib.sha256, data)
            files.write(folder / name, data)
            digest = hashing.result().hexdigest()
            written[name] = {"bytes": len(data), "sha256": digest}
        files.write(folder / f"part-{self._world.rank}.json", json_bytes(written))

    def _commit_and_retain(self, folder: Path) -> None:
        if self._lease:
            self._lease.require()
        self.checkpoints.commit(folder)
        try:
            self.checkpoints.retain(self.retention, step_of(folder), self._safe_step)
        except OSError as error:
            log.warning(f"old checkpoints could not be removed: {error}")

    def progress(self) -> list[float]:
        """Returns what this rank knows of the save under way, each 0 or 1: its files are written, something has failed,
        the checkpoint counts."""
        written = _has_succeeded(self._writing)
        failed = self._fault() is not None
        committed = _has_succeeded(self._committing)
        return [float(written), float(failed), float(committed)]

    def advance(self, written: float, failed: float, committed: float) -> Path | None:
        """Takes the save under way further by what all ranks know, the sums of `progress`. Returns the folder of a
        checkpoint that has just become whole. Raises SaveError after the third failure in a row."""
        folder = self._folder
        if folder is None:
            return None
        # Rank 0 alone commits, so its vote is enough.
        if committed:
            self._forget()
            self._failures = 0
            self.newest = folder
            return folder
        # A failed save is given up when no rank writes any more.
        if failed and written + failed >= self._world.size:
            fault = self._fault()
            self._forget()
            if self._world.is_first:
                self._clean_up(folder)
            self._count_failure(folder, fault)
        elif written == self._world.size and self._world.is_first and self._committing is None:
            self._committing = self._writing_thread.submit(self._commit_and_retain, folder)
        return None

    def finish(self) -> Path | None:
        """Waits for the save under way. Returns its folder if it is whole, None if it failed or there was none."""
        whole = None
        while self._folder:
            for work in (self._writing, self._committing):
                # Waits for it. `advance` acts on its error.
                if work:
                    work.exception()
            progress = torch.tensor(self.progress(), device=self._world.device)
            whole = self.advance(*self._world.sum(progress).tolist())
        return whole

    def _fault(self) -> str | None:
        """Returns what has gone wrong on this rank in the save under way, or None."""
        return _find_fault(self._writing) or _find_fault(self._committing)

    def _forget(self) -> None:
        self._folder = self._writing = self._committing = None

    def _count_failure(self, folder: Path, fault: str | None) -> None:
        """`fault` is known on the ranks that met it."""
        self._failures += 1
        if fault:
            log.error(f"{folder}: could not be saved: {fault}; training goes on")
        if self._failures >= _MOST_FAILURES:
            reason = f": {fault}" if fault else ""
            raise SaveError(
                f"{self._failures} checkpoints in a row could not be saved, the last one {folder}{reason}: make room "
                "or mend the disk, then start the same command again"
            )

    def _clean_up(self, folder: Path) -> None:
        try:
            self.checkpoints.sweep()
        except OSError as error:
            log.warning(f"{folder}: its remains could not be removed: {error}")

    def close(self) -> None:
        self._writing_thread.shutdown()
        self._hashing_thread.shutdown()


def _has_succeeded(work: Future[None] | None) -> bool:
    return work is not None and work.done() and work.exception() is None


def _find_fault(work: Future[None] | None) -> str | None:
    """Returns the error of the disk that has ended the work, or None. Raises any other error."""
    if work is None or not work.done():
        return None
    error = work.exception()
    if error is None:
        return None
    if isinstance(error, OSError):
        return str(error) or repr(error)
    raise error
