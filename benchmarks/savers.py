"""The ways to save a training state that benchmarks.checkpoint compares, behind one protocol.

    begin ──▶ training may go on ──▶ done? done? … ──▶ on disk

Each writes below a folder of its own. What they write is the same (`share_of`), with one exception: DeepSpeed's
engine knows nothing of the average.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from pipeline.train.checkpoint import Checkpoints, Retention, State
from pipeline.train.checkpoint_files import range_key
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.saver import Saver
from pipeline.world import World

_STAGERS_SAVE_ONCE = torch.__version__ < "2.12"
"""torch 2.11 closes a stager after its first save, so that its memory is not used again."""
EVERY_ONE = Retention(last=1_000_000)


def share_of(engine: Engine, ema: Ema, world: World) -> dict[str, Tensor]:
    """This rank's part of the full state, on the device: the weights on the first rank, their average on the last,
    and the moments that the rank has. Views; collective at ZeRO stage 3."""
    share = {
        range_key(name, moment, start, values.numel()): values for name, moment, start, values in engine.fragments()
    }
    weights, average = engine.weights(), ema.weights()
    if world.is_first:
        share.update((f"model.{name}", tensor) for name, tensor in weights.items())
    if world.rank == world.size - 1:
        share.update((f"ema.{name}", tensor) for name, tensor in average.items())
    return share


class Contender(Protocol):
    """All methods are collective."""

    def begin(self) -> None:
        """Start a save. Returns when training may go on."""
        ...

    def done(self) -> bool:
        """Whether the save is complete on all ranks. To be called at every step, which changes nothing else."""
        ...

    def wait(self) -> None:
        """Until the save is complete on all ranks."""
        ...


class Ours:
    """pipeline.train.saver, as the loop uses it."""

    def __init__(self, folder: Path, engine: Engine, ema: Ema, world: World) -> None:
        self._world, self._step = world, 0
        self.checkpoints = Checkpoints(folder, world, identity={})
        self._saver = Saver(self.checkpoints, EVERY_ONE, engine, ema, world)

    @property
    def newest(self) -> Path:
        return self.checkpoints.path(self._step)

    def begin(self) -> None:
        self._step += 1
        self._saver.save(State(step=self._step), safe_step=0)

    def done(self) -> bool:
        progress = torch.tensor(self._saver.progress(), device=self._world.device)
        return self._saver.advance(*self._world.sum(progress).tolist()) == self.newest

    def wait(self) -> None:
        if self._saver.finish() != self.newest:
            raise RuntimeError(f"{self.newest} could not be saved")

    def close(self) -> None:
        self._saver.close()


class Blocking:
    """A function that writes everything before it returns."""

    def __init__(self, save: Callable[[], object], world: World) -> None:
        self._save, self._world = save, world

    def begin(self) -> None:
        self._save()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        self._world.barrier()


def save_by_deepspeed(folder: Path, engine: Engine) -> None:
    """DeepSpeed's own checkpoint of its engine. Nothing is synced to the disk."""
    engine._engine.save_checkpoint(str(folder), tag="newest")


def save_by_torch(folder: Path, share: Callable[[], dict[str, Tensor]], world: World, *, sync: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{world.rank}.pt").open("wb") as file:
        torch.save(share(), file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


class Distributed:
    """torch.distributed.checkpoint.async_save in a thread, which syncs its files.

    Without options memory is allocated at each save, as by default; with them the memory of the first is used again.
    """

    def __init__(
        self, folder: Path, share: Callable[[], dict[str, Tensor]], world: World, options: StagingOptions | None = None
    ) -> None:
        self._folder, self._share, self._world = folder, share, world
        # Its threads take part in collectives, so they need a group of their own, on the CPU.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self._group = group
        self._options = options or StagingOptions()
        self._stager = DefaultStager(options) if options else None
        self._saved: Future[Any] = Future()
        self.staged: Future[None] | None = None  # until then no weight may change

    def begin(self) -> None:
        if self._stager and _STAGERS_SAVE_ONCE:
            self._stager = DefaultStager(self._options)
        answer = async_save(
            self._share(), checkpoint_id=self._folder, process_group=self._group, async_stager=self._stager
        )
        if isinstance(answer, AsyncSaveResponse):
            self.staged, self._saved = answer.staging_completion, answer.upload_completion
        else:
            self._saved = answer

    def done(self) -> bool:
        done = torch.tensor(float(self._saved.done()), device=self._world.device)
        return self._world.sum(done).item() == self._world.size

    def wait(self) -> None:
        self._saved.result()
        self._world.barrier()

    def close(self) -> None:
        if self._stager:
            self._stager.close()


def contenders(folder: Path, engine: Engine, ema: Ema, world: World) -> dict[str, Contender]:
    """By the name of their folder in `folder`."""
    on_gpu = world.device.type == "cuda"

    def share() -> dict[str, Tensor]:
        return share_of(engine, ema, world)

    def staging(*, behind: bool) -> StagingOptions:
        return StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=behind, use_non_blocking_copy=on_gpu
        )

    return {
        "ours": Ours(folder / "ours", engine, ema, world),
        "deepspeed": Blocking(lambda: save_by_deepspeed(folder / "deepspeed", engine), world),
        "torch_save": Blocking(lambda: save_by_torch(folder / "torch_save", share, world, sync=False), world),
        "torch_save_fsync": Blocking(
            lambda: save_by_torch(folder / "torch_save_fsync", share, world, sync=True), world
        ),
        "dcp_async": Distributed(folder / "dcp_async", share, world),
        "dcp_async_cached": Distributed(folder / "dcp_async_cached", share, world, staging(behind=False)),
        "dcp_async_staged": Distributed(folder / "dcp_async_staged", share, world, staging(behind=True)),
    }
