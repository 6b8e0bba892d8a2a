"""Portable checkpoints: full tensors by parameter name, whole or absent.

    checkpoints/step-00001200/
        model.safetensors          every weight and buffer, fp32
        ema.safetensors            the same of their moving average, where one is kept
        optimizer-R.safetensors    rank R's share of Adam's moments: flat ranges "exp_avg.NAME[START:STOP]"
        state.json                 step and the other numbers
        part-R.json                sizes and SHA-256 of what rank R wrote
        COMMIT.json                the same for all files; the checkpoint counts once this is renamed into place

The ranges of all ranks together are every parameter's moments, so a checkpoint loads on any world and at any ZeRO
stage. `saver.py` writes them.
"""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline import files
from pipeline.config import validated
from pipeline.errors import InputError
from pipeline.run_folder import committed_checkpoints
from pipeline.train.checkpoint_files import (
    COMMIT,
    EMA,
    FORMAT,
    MODEL,
    STATE,
    damage,
    json_bytes,
    parse_range,
    read_document,
    score_of,
    step_of,
    verify_checkpoint,
)
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.loss_scale import LossScale
from pipeline.train.moments import ReadMoment
from pipeline.world import World

log = logging.getLogger(__name__)

# Entries of the identity that no resume.allow can bridge.
SHAPES_WEIGHTS = ("model", "model_image_size", "image_size", "num_classes", "task")


@dataclasses.dataclass
class State:
    """Where a run stands."""

    step: int = 0
    """The number of consumed global batches, which is all there is to the position in the data."""
    skipped: int = 0
    adam_steps: int = 0
    ema_steps: int = 0
    loss_scale: dict[str, float] | None = None
    guard: dict[str, Any] | None = None
    scores: dict[str, float] | None = None
    """The scores of the newest evaluation, which was at scored_step."""
    scored_step: int | None = None
    run_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `last`, the `best` by score, and every one on the grid `every`.

    The one that rolling back would take is kept as well: the newest on the regular grid from before trouble began.
    """

    last: int = 3
    best: int = 1
    every: int = 0
    """The grid's period in steps; 0 for none."""
    grid: int = 0
    """The regular grid's period in steps, train.save_every; 0 for none."""
    metric: str = "top1"
    """The score that is compared; a higher one is better."""

    def is_regular(self, step: int) -> bool:
        return self.grid > 0 and step % self.grid == 0

    def kept(self, scores: Mapping[int, float | None], safe_step: int) -> set[int]:
        """Returns the steps of the checkpoints to keep, given all by step with their scores (None: not evaluated)."""
        steps = sorted(scores)
        kept = set(steps[-self.last :])
        if self.best:
            scored = [step for step in steps if scores[step] is not None]
            # Of equal scores the older one is the better.
            scored.sort(key=lambda step: (scores[step], -step))
            kept.update(scored[-self.best :])
        safe = [step for step in steps if self.is_regular(step) and step <= safe_step]
        kept.update(safe[-1:])
        if self.every > 0:
            kept.update(step for step in steps if step > 0 and step % self.every == 0)
        return kept


class Checkpoints:
    """The checkpoints of one run. `identity` is what must not change during a run, as Config.identity() gives it."""

    def __init__(self, folder: Path, world: World, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._world = world
        self._identity = identity

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, in order. They may yet prove damaged."""
        return list(committed_checkpoints(self.folder))

    def make(self, step: int) -> None:
        """Makes an empty folder, whatever a killed save, another trajectory or a bad disk left there. On rank 0.

        What was there is kept until the new one is committed: it may be whole, and saved again for its scores alone.
        """
        folder, replaced = self.path(step), self._replaced(step)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        folder.mkdir(parents=True)
        # So that a power cut cannot take the folder's name after COMMIT.json is in it.
        files.sync_folder(self.folder)

    def _replaced(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.replaced"

    def remove(self, step: int) -> None:
        folder = self.path(step)
        if folder.exists():
            # Renamed first, so that nobody who looks for checkpoints finds a half-deleted one.
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            folder.rename(discarded)
            shutil.rmtree(discarded)

    def sweep(self) -> None:
        """Removes what killed processes left half-written or half-deleted, and restores checkpoints that a half-written
        one was to replace. On rank 0, while nobody writes."""
        for folder in self.folder.glob("step-*"):
            if not (folder / COMMIT).exists():
                self.remove(step_of(folder))
        for replaced in self.folder.glob(".step-*.replaced"):
            folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
            if folder.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(folder)
        for folder in self.folder.glob(".step-*.discarded"):
            shutil.rmtree(folder)

    def state_document(self, state: State) -> bytes:
        return json_bytes({"format": FORMAT, "identity": self._identity, "state": dataclasses.asdict(state)})

    def commit(self, folder: Path) -> None:
        """Makes the checkpoint count, once every rank has written its files. On rank 0."""
        listing = {}
        for rank in range(self._world.size):
            listing |= json.loads((folder / f"part-{rank}.json").read_text())
        # Last, and renamed into place: from here on the checkpoint counts.
        files.write(folder / COMMIT, json_bytes({"format": FORMAT, "files": listing}))
        shutil.rmtree(self._replaced(step_of(folder)), ignore_errors=True)

    def retain(self, retention: Retention, newest: int, safe_step: int) -> None:
        """Removes the checkpoints up to `newest` that need not be kept; later ones are damaged, and written again. On
        rank 0."""
        scores = {}
        for step in self.steps():
            if step <= newest:
                scores[step] = score_of(self.path(step), retention.metric)
        for step in scores.keys() - retention.kept(scores, safe_step):
            self.remove(step)

    def find(self, source: str, allow: list[str]) -> Path | None:
        """Returns the checkpoint folder that resume.source means, or None to start at step 0. It reads every byte, so
        one rank calls it and sends the others its result.

        A path is where a run starts that has no checkpoint of its own: started again, it goes on from its own.

        Raises InputError for a checkpoint that another run has made, a damaged named one, or one that resume.source
        forbids, and for a run none of whose own can be used: that is not started over unless `set_aside` is called
        first.
        """
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if source == "never" and own:
            raise InputError(f"{self.folder} holds checkpoints but resume.source is never: choose another run.name")
        folder = next(filter(verify_checkpoint, own), None)
        if own and folder is None:
            newest = own[0]
            raise InputError(
                f"{self.folder}: none of {len(own)} checkpoints can be used, {newest.name} because: {damage(newest)}; "
                "restore one, go on with the version of this project that saved them, choose another run.name, or set "
                "resume.start_over=true, which puts them aside and starts at step 0"
            )
        if source not in ("auto", "never"):
            folder = _choose_start(Path(source), folder)
        if folder:
            self._require_same_identity(folder, allow)
        return folder

    def set_aside(self) -> None:
        """Renames the folder of checkpoints if none of those in it can be used, so that the run starts over."""
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if own and not any(map(verify_checkpoint, own)):
            now = time.strftime("%Y%m%dT%H%M%S")
            aside = self.folder.with_name(f"{self.folder.name}-{now}")
            self.folder.rename(aside)
            message = f"resume.start_over: starting at step 0; {aside} holds the checkpoints"
            log.warning(message)

    def find_regular(self, retention: Retention, safe_step: int) -> Path | None:
        """Returns the newest whole checkpoint on the regular grid at or before `safe_step`. It reads every byte, so one
        rank calls it."""
        for step in reversed(self.steps()):
            if retention.is_regular(step) and step <= safe_step and verify_checkpoint(self.path(step)):
                return self.path(step)
        return None

    def _require_same_identity(self, folder: Path, allow: list[str]) -> None:
        saved = read_document(folder)["identity"]
        for name in sorted(saved.keys() | self._identity.keys()):
            theirs, ours = saved.get(name), self._identity.get(name)
            fixed = name in SHAPES_WEIGHTS
            if theirs == ours or (name in allow and not fixed):
                continue
            remedy = "set it back, or choose another run.name"
            if not fixed:
                remedy += f", or accept it with resume.allow: [{name}]"
            raise InputError(f"{folder}: {name} is {theirs!r} in the checkpoint and {ours!r} in this run: {remedy}")


def _choose_start(named: Path, own: Path | None) -> Path:
    """Returns where a run starts for which resume.source names a checkpoint, and which may have one of its own."""
    if own is None:
        fault = damage(named)
        if fault:
            raise InputError(f"resume.source {named}: {fault}")
        return named
    if named.resolve() != own.resolve():
        log.warning(
            f"{own}: the run goes on from here: it has begun, and resume.source {named} is where it began; to start "
            "there anew, choose another run.name"
        )
    return own


class Checkpoint:
    """A whole checkpoint on disk, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        known = {field.name for field in dataclasses.fields(State)}
        saved = {}
        # Earlier versions have saved more.
        for name, value in read_document(folder)["state"].items():
            if name in known:
                saved[name] = value
        validated(State, saved, folder / STATE)
        # The state as it was saved: pydantic's would have floats for the loss scale's counts.
        self.state = State(**saved)

    def weights(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / MODEL)

    def restore(self, engine: Engine, ema: Ema | None) -> None:
        """Puts the optimiser and the average back; the weights have to be in the engine already.

        An average that the checkpoint lacks begins with the weights.
        """
        engine.load_moments(self._open_moments(), self.state.adam_steps)
        if engine.loss_scale and self.state.loss_scale:
            engine.loss_scale = LossScale(**self.state.loss_scale)  # pyright: ignore[reportArgumentType]
        if ema:
            path = self.folder / EMA
            if not path.exists():
                path = self.folder / MODEL
            ema.load(safetensors.torch.load_file(path), self.state.ema_steps)

    def _open_moments(self) -> ReadMoment:
        """Returns a function that reads a range of a flattened moment from whatever ranges the ranks wrote."""
        ranges: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(self.folder.glob("optimizer-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, first, last = parse_range(key)
                ranges.setdefault(name, []).append((first, last, file.get_slice(key)))
        for saved in ranges.values():
            saved.sort(key=lambda entry: entry[0])

        def read(name: str, moment: str, start: int, stop: int) -> Tensor:
            pieces = []
            for first, last, values in ranges[f"{moment}.{name}"]:
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    pieces.append(values[begin - first : end - first])
            whole = torch.cat(pieces)
            assert len(whole) == stop - start, f"{self.folder}: {moment} of {name} is not all there"
            return whole

        return read
