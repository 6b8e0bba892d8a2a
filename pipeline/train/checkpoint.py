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
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline import files
from pipeline.config import validated
from pipeline.errors import InputError
from pipeline.train.checkpoint_files import (
    COMMIT,
    EMA,
    FORMAT,
    MODEL,
    STATE,
    damage,
    is_whole,
    json_bytes,
    parse_range,
    read_document,
    score_of,
    step_of,
)
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine, LossScale
from pipeline.world import World

# Entries of the identity that no resume.allow can bridge.
SHAPES_WEIGHTS = ("model", "model_image_size", "image_size", "num_classes", "task")


@dataclasses.dataclass
class State:
    """Where a run stands. `step` counts consumed global batches, which is all there is to the position in the data."""

    step: int = 0
    skipped: int = 0
    adam_steps: int = 0
    ema_steps: int = 0
    loss_scale: dict[str, float] | None = None
    guard: dict[str, Any] | None = None
    scores: dict[str, float] | None = None  # of the newest evaluation, which was at scored_step
    scored_step: int | None = None
    run_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `last`, the `best` by score, and every one on the grid `every`.

    Also the one that rolling back would take: the newest on the regular grid from before trouble began.
    """

    last: int = 3
    best: int = 1
    every: int = 0  # steps; 0: none
    grid: int = 0  # of train.save_every, in steps; 0: no grid
    metric: str = "top1"  # higher is better

    def is_regular(self, step: int) -> bool:
        return self.grid > 0 and step % self.grid == 0

    def kept(self, scores: Mapping[int, float | None], safe_step: int) -> set[int]:
        """Of checkpoints, given as step and score (None: was not evaluated), the steps of those to keep."""
        steps = sorted(scores)
        scored = sorted((step for step in steps if scores[step] is not None), key=lambda step: (scores[step], -step))
        regular = [step for step in steps if self.is_regular(step) and step <= safe_step]
        grid = [step for step in steps if self.every > 0 and step % self.every == 0 and step > 0]
        return {*steps[-self.last :], *scored[len(scored) - self.best :], *regular[-1:], *grid}


class Checkpoints:
    """Those of one run. `identity` is Config.identity() and the like: what must not change under a run."""

    def __init__(self, folder: Path, world: World, identity: dict[str, Any]) -> None:
        self.folder, self._world, self._identity = folder, world, identity

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Of the committed checkpoints, in order. They may yet prove damaged."""
        return [step_of(path.parent) for path in sorted(self.folder.glob(f"step-*/{COMMIT}"))]

    def make(self, step: int) -> None:
        """An empty folder, whatever a killed save, another trajectory or a bad disk left there. On rank 0.

        That is kept until the new one is committed: it may be whole, and saved again for its scores alone.
        """
        if self.path(step).exists():
            shutil.rmtree(self._replaced(step), ignore_errors=True)
            self.path(step).rename(self._replaced(step))
        self.path(step).mkdir(parents=True)
        files.sync_folder(self.folder)

    def _replaced(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.replaced"

    def remove(self, step: int) -> None:
        folder = self.path(step)
        if folder.exists():
            # Out of discovery's sight first, so that it never sees a half-deleted one.
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            folder.rename(discarded)
            shutil.rmtree(discarded)

    def sweep(self) -> None:
        """Remove what killed processes left half-written or half-deleted, and restore what the former was to replace.
        On rank 0, while nobody writes."""
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
        """Make the checkpoint count, once every rank's part is there. On rank 0."""
        parts = [json.loads((folder / f"part-{r}.json").read_text()) for r in range(self._world.size)]
        listing = {name: entry for part in parts for name, entry in part.items()}
        files.write(folder / COMMIT, json_bytes({"format": FORMAT, "files": listing}))
        shutil.rmtree(self._replaced(step_of(folder)), ignore_errors=True)

    def retain(self, retention: Retention, newest: int, safe_step: int) -> None:
        """Remove the checkpoints up to `newest` that need not be kept; later ones are damaged, and written again. On
        rank 0."""
        scores = {step: score_of(self.path(step), retention.metric) for step in self.steps() if step <= newest}
        for step in scores.keys() - retention.kept(scores, safe_step):
            self.remove(step)

    def find(self, source: str, allow: list[str]) -> Path | None:
        """The checkpoint folder that resume.source means, or None to start fresh. For one rank to ask: it reads
        every byte, and the others take its answer.

        A path is where a run starts that has no checkpoint of its own: started again, it goes on from its own.

        Raises InputError for a checkpoint of another run's making, a damaged named one, or one nobody asked for, and
        for a run none of whose own can be used, which is not started over unless `set_aside` is called first.
        """
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if source == "never" and own:
            raise InputError(
                f"{self.folder} holds checkpoints but resume.source is never: give the run another run.name"
            )
        folder = next(filter(is_whole, own), None)
        if own and folder is None:
            raise InputError(
                f"{self.folder}: none of {len(own)} checkpoints can be used, {own[0].name} because: {damage(own[0])}; "
                "restore one, go on with the version of this project that saved them, choose another run.name, or set "
                "resume.start_over=true, which puts them aside and starts at step 0"
            )
        if source not in ("auto", "never"):
            folder = _start(Path(source), folder)
        if folder:
            self._compare(folder, allow)
        return folder

    def set_aside(self) -> None:
        """Rename the folder of checkpoints if none of those in it can be used, so that the run starts over."""
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if own and not any(map(is_whole, own)):
            aside = self.folder.with_name(f"{self.folder.name}-{time.strftime('%Y%m%dT%H%M%S')}")
            self.folder.rename(aside)
            print(f"resume.start_over: starting at step 0; {aside} holds the checkpoints", file=sys.stderr, flush=True)

    def find_regular(self, retention: Retention, safe_step: int) -> Path | None:
        """The newest whole checkpoint on the regular grid at or before `safe_step`. For one rank to ask."""
        regular = [step for step in self.steps() if retention.is_regular(step) and step <= safe_step]
        return next(filter(is_whole, (self.path(step) for step in reversed(regular))), None)

    def _compare(self, folder: Path, allow: list[str]) -> None:
        theirs = read_document(folder)["identity"]
        for name in sorted(theirs.keys() | self._identity.keys()):
            fixed = name in SHAPES_WEIGHTS
            if theirs.get(name) != self._identity.get(name) and (fixed or name not in allow):
                accept = "" if fixed else f", or accept it with resume.allow: [{name}]"
                raise InputError(
                    f"{folder}: {name} is {theirs.get(name)!r} in the checkpoint and {self._identity.get(name)!r} in "
                    f"this run: set it back, or give the run another run.name{accept}"
                )


def _start(named: Path, own: Path | None) -> Path:
    """Where a run starts that has been named a checkpoint and may have an own one."""
    if own is None:
        if fault := damage(named):
            raise InputError(f"resume.source {named}: {fault}")
        return named
    if named.resolve() != own.resolve():
        told = f"{own}: the run goes on from here: it has begun, and resume.source {named} is where it began"
        print(f"{told}; to start there anew, give it another run.name", file=sys.stderr, flush=True)
    return own


class Checkpoint:
    """A whole checkpoint on disk, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        known = {field.name for field in dataclasses.fields(State)}  # earlier versions have saved more
        saved = {name: value for name, value in read_document(folder)["state"].items() if name in known}
        validated(State, saved, folder / STATE)
        self.state = State(**saved)  # as it was saved: pydantic would make floats of the loss scale's counts

    def weights(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / MODEL)

    def restore(self, engine: Engine, ema: Ema | None) -> None:
        """Put the optimiser and the average back; the weights have to be in the engine already.

        An average that the checkpoint lacks begins with the weights.
        """
        engine.load_moments(self._reader(), self.state.adam_steps)
        if engine.loss_scale and self.state.loss_scale:
            engine.loss_scale = LossScale(**self.state.loss_scale)  # pyright: ignore[reportArgumentType]
        if ema:
            kept = (self.folder / EMA).exists()
            ema.load(safetensors.torch.load_file(self.folder / (EMA if kept else MODEL)), self.state.ema_steps)

    def _reader(self) -> Callable[[str, str, int, int], Tensor]:
        """Reads a range of a flattened moment from whatever ranges the ranks wrote."""
        ranges: dict[str, list[tuple[int, int, Any]]] = {}
        for file in sorted(self.folder.glob("optimizer-*.safetensors")):
            share = safe_open(file, framework="pt")
            for key in share.keys():  # noqa: SIM118 - not a mapping
                name, first, last = parse_range(key)
                ranges.setdefault(name, []).append((first, last, share.get_slice(key)))

        def read(name: str, moment: str, start: int, stop: int) -> Tensor:
            pieces = [
                values[max(start, first) - first : min(stop, last) - first]
                for first, last, values in sorted(ranges[f"{moment}.{name}"], key=lambda piece: piece[0])
                if first < stop and start < last
            ]
            whole = torch.cat(pieces)
            assert len(whole) == stop - start, f"{self.folder}: {moment}.{name}[{start}:{stop}] is not all there"
            return whole

        return read
