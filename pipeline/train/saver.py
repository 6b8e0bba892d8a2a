"""Saves behind training: it waits while its state is copied to host memory, and for nothing else.

    main thread      save ─ copy ┐            settle ┐              settle: it counts
    every rank's thread          └ write part         │
    rank 0's thread                                   └ commit, remove old ones

What the threads have done goes from rank to rank with the reduction that every step makes anyway (`progress`, then
`settle`), so that no thread but the main one takes part in a collective. One save is under way at a time; when the
next is due before it has ended, training waits.
"""

import dataclasses
import hashlib
import os
import sys
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

_MOST_FAILURES = 3


class SaveError(ExternalError):
    """Checkpoints cannot be saved."""


class Saver:
    """Writes one run's checkpoints. All methods are collective but `progress`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        retention: Retention,
        engine: Engine,
        ema: Ema | None,
        world: World,
        lease: Lease | None = None,
    ) -> None:
        """`lease`: rank 0's of the run's folder."""
        self.checkpoints, self.retention, self._world = checkpoints, retention, world
        self._engine, self._ema, self._lease = engine, ema, lease
        pin = world.device.type == "cuda"
        self._snapshots = {name: Snapshot(tensors, pin=pin) for name, tensors in self._my_tensors().items()}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint digest")
        self._part: Future[None] | None = None
        self._commit: Future[None] | None = None
        self._folder: Path | None = None  # being written
        self._failures = 0
        self.newest: Path | None = None  # whole, and written or loaded by this process

    def save(self, state: State, safe_step: int) -> None:
        """Begin to save; returns when the state has been copied. Waits for the save before it. All ranks end at once
        where another job has taken over the run's folder.

        Raises SaveError after the third failure in a row.
        """
        self.finish()
        self._require_lease()
        folder = self.checkpoints.path(state.step)
        if folder == self.newest:
            return
        self._copy()
        if problem := self._world.from_first(self._make_folder(state.step) if self._world.is_first else None):
            self._failed(folder, problem)
            return
        state = dataclasses.replace(
            state,
            adam_steps=self._engine.adam_steps(),
            ema_steps=self._ema.steps if self._ema else 0,
            loss_scale=dataclasses.asdict(self._engine.loss_scale) if self._engine.loss_scale else None,
        )
        contents = {name: snapshot.data() for name, snapshot in self._snapshots.items()}
        if self._world.is_first:
            contents[STATE] = memoryview(self.checkpoints.state_document(state))
        self._folder, self._safe_step = folder, safe_step
        self._part = self._thread.submit(self._write_part, folder, contents)

    def _my_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File names and contents of this rank's share. Collective at stage 3."""
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
        if lost:  # told before the others hear of it: a launcher ends all ranks as soon as one has ended
            print(f"error: {lost}", file=sys.stderr, flush=True)
        if self._world.from_first(bool(lost)):
            os._exit(FAILED)

    def _copy(self) -> None:
        tensors = self._my_tensors()
        for name, snapshot in self._snapshots.items():
            snapshot.fill(tensors[name])
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _make_folder(self, step: int) -> str | None:
        try:
            self.checkpoints.make(step)
        except OSError as error:
            return str(error)
        return None

    def _write_part(self, folder: Path, contents: dict[str, memoryview]) -> None:
        part: dict[str, dict[str, Any]] = {}
        for name, data in contents.items():
            digest = self._hashing.submit(hashlib.sha256, data)
            files.write(folder / name, data)
            part[name] = {"bytes": len(data), "sha256": digest.result().hexdigest()}
        files.write(folder / f"part-{self._world.rank}.json", json_bytes(part))

    def _commit_and_retain(self, folder: Path) -> None:
        if self._lease:
            self._lease.require()
        self.checkpoints.commit(folder)
        try:
            self.checkpoints.retain(self.retention, step_of(folder), self._safe_step)
        except OSError as error:
            print(f"old checkpoints could not be removed: {error}", file=sys.stderr, flush=True)

    def progress(self) -> list[float]:
        """What this rank has to say of the save under way: [its part is written, something failed, it counts]."""
        part, commit = self._part, self._commit
        return [
            float(_succeeded(part)),
            float(_problem(part) is not None or _problem(commit) is not None),
            float(_succeeded(commit)),
        ]

    def settle(self, written: float, failed: float, committed: float) -> Path | None:
        """Go on by what all ranks have said: sums of `progress`. Returns the folder of a checkpoint that has just
        become whole. Raises SaveError after the third failure in a row."""
        folder = self._folder
        if folder is None:
            return None
        if committed:
            self._forget()
            self._failures = 0
            self.newest = folder
            return folder
        if failed and written + failed >= self._world.size:  # nobody writes any more
            problem = _problem(self._part) or _problem(self._commit)
            self._forget()
            if self._world.is_first:
                self._clean_up(folder)
            self._failed(folder, problem)
        elif written == self._world.size and self._world.is_first and self._commit is None:
            self._commit = self._thread.submit(self._commit_and_retain, folder)
        return None

    def finish(self) -> Path | None:
        """Wait for the save under way. Returns its folder if it is whole, None if it failed or there was none."""
        whole = None
        while self._folder:
            for job in (self._part, self._commit):
                if job:
                    job.exception()  # waits
            progress = torch.tensor(self.progress(), device=self._world.device)
            whole = self.settle(*self._world.sum(progress).tolist())
        return whole

    def _forget(self) -> None:
        self._folder = self._part = self._commit = None

    def _failed(self, folder: Path, problem: str | None) -> None:
        self._failures += 1
        if problem:  # told by the ranks that met it
            print(f"{folder}: could not be saved: {problem}; training goes on", file=sys.stderr, flush=True)
        if self._failures >= _MOST_FAILURES:
            raise SaveError(
                f"{self._failures} checkpoints in a row could not be saved, the last one {folder}"
                f"{f': {problem}' if problem else ''}: make room or mend the disk, then start the same command again"
            )

    def _clean_up(self, folder: Path) -> None:
        try:
            self.checkpoints.sweep()
        except OSError as error:
            print(f"{folder}: its remains could not be removed: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._thread.shutdown()
        self._hashing.shutdown()


def _succeeded(job: Future[None] | None) -> bool:
    return job is not None and job.done() and job.exception() is None


def _problem(job: Future[None] | None) -> str | None:
    error = job.exception() if job is not None and job.done() else None
    if error is not None and not isinstance(error, OSError):
        raise error
    return str(error) if error is not None else None
