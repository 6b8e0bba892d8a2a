"""Portable checkpoints: full tensors by parameter name, whole or absent.

    checkpoints/step-00001200/
        model.safetensors          every weight and buffer, fp32
        optimizer-R.safetensors    rank R's share of Adam's moments, whole tensors
        state.json                 step and the other numbers
        part-R.json                sizes and SHA-256 of what rank R wrote
        COMMIT.json                the same for all files; the checkpoint counts once this is renamed into place

Neither the world size nor the ZeRO stage shows, so a checkpoint loads on any of either.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from torch import Tensor

from pipeline import files
from pipeline.errors import InputError
from pipeline.train.engine import Engine, LossScale
from pipeline.world import World

COMMIT, MODEL, STATE = "COMMIT.json", "model.safetensors", "state.json"
FORMAT = 1

SHAPES_WEIGHTS = ("model", "image_size", "num_classes")  # entries of the identity that no resume.allow can bridge


@dataclasses.dataclass
class State:
    """Where a run stands. `step` counts consumed global batches, which is all there is to the position in the data."""

    step: int = 0
    skipped: int = 0
    adam_steps: int = 0
    loss_scale: dict[str, float] | None = None
    run_id: str | None = None

    def advance(self, applied: bool) -> None:
        self.step += 1
        self.skipped += not applied


class Checkpoints:
    """Those of one run. `identity` is Config.identity() and the like: what must not change under a run."""

    def __init__(self, folder: Path, world: World, identity: dict[str, Any]) -> None:
        self._folder, self._world, self._identity = folder, world, identity
        self._newest: Path | None = None  # that this process has written or opened

    def save(self, state: State, engine: Engine) -> Path:
        """Write a checkpoint; collective. The folder is complete on return."""
        folder = self._folder / f"step-{state.step:08d}"
        if folder == self._newest:
            return folder
        state = dataclasses.replace(
            state,
            adam_steps=engine.adam_steps(),
            loss_scale=dataclasses.asdict(engine.loss_scale) if engine.loss_scale else None,
        )
        if self._world.is_first:
            self._clear(folder)
        self._world.barrier()
        weights = engine.weights()
        contents = {f"optimizer-{self._world.rank}.safetensors": safetensors.torch.save(self._my_moments(engine))}
        if self._world.is_first:
            contents[MODEL] = safetensors.torch.save(weights)
            document = {"format": FORMAT, "identity": self._identity, "state": dataclasses.asdict(state)}
            contents[STATE] = _json(document)
        part = {name: _write(folder / name, data) for name, data in contents.items()}
        _write(folder / f"part-{self._world.rank}.json", _json(part))
        self._world.barrier()
        if self._world.is_first:
            parts = [json.loads((folder / f"part-{r}.json").read_text()) for r in range(self._world.size)]
            listing = {name: entry for part in parts for name, entry in part.items()}
            _write(folder / COMMIT, _json({"format": FORMAT, "files": listing}))
        self._world.barrier()
        self._newest = folder
        return folder

    def _clear(self, folder: Path) -> None:
        """Make the folder, and make it empty, whatever a killed save, another trajectory or a bad disk left there."""
        if folder.exists():
            # Out of discovery's sight first, so that it never sees a half-deleted one.
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            folder.rename(discarded)
            shutil.rmtree(discarded)
        folder.mkdir(parents=True)

    def _my_moments(self, engine: Engine) -> dict[str, Tensor]:
        """This rank's share: dealt out in turn to whoever holds least so far."""
        load = [0] * self._world.size
        share = {}
        for name, moment, tensor in engine.moments():
            owner = load.index(min(load))
            load[owner] += tensor.numel()
            if owner == self._world.rank:
                share[f"{moment}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return share

    def find(self, source: str, allow: list[str]) -> Path | None:
        """The checkpoint folder that resume.source means, or None to start fresh. For one rank to ask: it reads
        every byte, and the others take its answer.

        Raises InputError for a checkpoint of another run's making, a damaged named one, or one nobody asked for.
        """
        if source not in ("auto", "never"):
            folder = Path(source)
            if fault := damage(folder):
                raise InputError(f"resume.source {folder}: {fault}")
        else:
            candidates = sorted(self._folder.glob("step-*"), reverse=True)
            if source == "never" and candidates:
                raise InputError(
                    f"{self._folder} holds checkpoints but resume.source is never: give the run another run.name"
                )
            folder = next(filter(_is_whole, candidates), None)
        if folder:
            self._compare(folder, allow)
        return folder

    def open(self, folder: Path) -> "Checkpoint":
        """The checkpoint that `find` found, for every rank to load."""
        self._newest = folder
        return Checkpoint(folder)

    def _compare(self, folder: Path, allow: list[str]) -> None:
        theirs = json.loads((folder / STATE).read_text())["identity"]
        for name in sorted(theirs.keys() | self._identity.keys()):
            fixed = name in SHAPES_WEIGHTS
            if theirs.get(name) != self._identity.get(name) and (fixed or name not in allow):
                accept = "" if fixed else f", or accept it with resume.allow: [{name}]"
                raise InputError(
                    f"{folder}: {name} is {theirs.get(name)!r} in the checkpoint and {self._identity.get(name)!r} in "
                    f"this run: set it back, or give the run another run.name{accept}"
                )


class Checkpoint:
    """A whole checkpoint on disk, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = State(**json.loads((folder / STATE).read_text())["state"])

    def weights(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / MODEL)

    def restore(self, engine: Engine) -> None:
        """Put the optimiser back; the weights have to be in the model before the engine is built on it."""
        engine.load_moments(self._moment_of(), self.state.adam_steps)
        if engine.loss_scale and self.state.loss_scale:
            engine.loss_scale = LossScale(**self.state.loss_scale)  # pyright: ignore[reportArgumentType]

    def _moment_of(self) -> Callable[[str, str], Tensor]:
        names = [name for name in Commit.read(self.folder).files if name.startswith("optimizer-")]
        shares = [safe_open(self.folder / name, framework="pt") for name in names]
        home = {key: share for share in shares for key in share.keys()}  # noqa: SIM118 - not a mapping

        def moment_of(name: str, moment: str) -> Tensor:
            return home[f"{moment}.{name}"].get_tensor(f"{moment}.{name}")

        return moment_of


class Entry(BaseModel):
    bytes: int
    sha256: str


class Commit(BaseModel):
    """COMMIT.json."""

    format: Literal[1]
    files: dict[str, Entry]

    @classmethod
    def read(cls, folder: Path) -> "Commit":
        return cls.model_validate_json((folder / COMMIT).read_text())


def damage(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None. Reads every byte.

    Raises InputError for one that a newer version of this code has written, which is not damaged.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        commit = Commit.read(folder)
    except FileNotFoundError:
        return f"no {COMMIT}: saving it did not finish"
    except ValidationError as error:
        if (found := _format_of(folder)) > FORMAT:
            raise InputError(f"{folder}: format {found}, but this version reads format {FORMAT}: update it") from None
        return f"{COMMIT} cannot be read: {error.errors()[0]['msg']}"
    except (OSError, ValueError) as error:
        return f"{COMMIT} cannot be read: {error}"
    if missing := {MODEL, STATE} - commit.files.keys():
        return f"{COMMIT} does not list {', '.join(sorted(missing))}"
    for name, entry in commit.files.items():
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if digest != entry.sha256:
            return f"{name} has SHA-256 {digest}, but {COMMIT} lists {entry.sha256}"
    return None


def _format_of(folder: Path) -> int:
    try:
        found = json.loads((folder / COMMIT).read_text())["format"]
        return found if isinstance(found, int) else 0
    except (ValueError, TypeError, KeyError):
        return 0


def _is_whole(folder: Path) -> bool:
    """Whether to resume from it. A damaged one is told and walked past: the run repeats the steps since the one
    before."""
    if fault := damage(folder):
        print(f"{folder} is passed over: {fault}", file=sys.stderr, flush=True)
    return fault is None


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and return its entry in the listings."""
    files.write(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
