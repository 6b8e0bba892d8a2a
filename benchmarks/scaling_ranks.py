"""What benchmarks.scaling measures, on each rank of a world of one or two: torchrun … -m benchmarks.scaling_ranks.

    network alone, copy, collectives ─▶ pieces of the model
    Engine.step at ZeRO 0 to 3       ─▶ what the model has to predict, and the collectives that it calls

All take turns in rounds. The first rank prints the readings of every rank: seconds, by linear function and name.
"""

import collections
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import synthetic
from benchmarks.scaling import (
    BURST,
    CHECKED,
    CHECKED_CLASSES,
    CHECKED_SETTINGS,
    COLLECTIVE_BYTES,
    ROUNDS,
    SETTINGS,
    SMALL,
    Case,
    Readings,
)
from benchmarks.scaling_model import Setting
from pipeline import world
from pipeline.tasks.classify import ClassificationTask, build_model
from pipeline.train.engine import Engine
from pipeline.world import World

TURN = 3
"""Steps in a turn. The first one finds the caches of those before it and does not count."""
KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


def main() -> None:
    here = world.start()
    found: dict[str, Any] = {"traffic": {}}
    # Stage 3 replaces torch's linear function for good. What its steps are compared with is measured again, with that.
    for linear, replaced in (("torch", False), ("deepspeed", True)):
        names = [name for name in CHECKED_SETTINGS if (SETTINGS[name].stage == 3) == replaced]
        engines = {name: engine_step(CHECKED, SETTINGS[name], here) for name in names}
        found[linear] = collections.defaultdict(list)
        turns = list(_turns(engines, here, found[linear]))
        for number, place in itertools.product(range(1 + ROUNDS), range(len(turns))):
            for count in range(TURN):
                turns[(number + place) % len(turns)](number > 0 and count > 0)
        for name, step in engines.items():
            with Traffic() as traffic:
                step()
            found["traffic"][name] = traffic.calls
    everybodys = here.gather_on_first(found)
    if here.is_first:
        print(json.dumps(everybodys), flush=True)
    world.stop()


def _turns(
    engines: dict[str, Callable[[], object]], here: World, readings: Readings
) -> Iterator[Callable[[bool], None]]:
    """Each measures something once and, if it is to count, adds to `readings`. Collective."""
    plain = Plain(CHECKED, here)
    gradients = [torch.ones_like(parameter) for parameter in plain.task.model.parameters()]
    acts: dict[str, Callable[[], object]] = {
        "copy": lambda: torch.cat([gradient.flatten() for gradient in gradients]),
        "small": Plain(SMALL, here).step,
    }
    acts |= {f"step {name}": step for name, step in engines.items()}
    if here.size == 1:
        acts |= {f"small {name}": engine_step(SMALL, SETTINGS[name], here) for name in engines}
    else:
        acts |= {"burst": lambda: burst(here)}
        acts |= collectives(here) if "ZeRO-0" in engines else {}

    def whole(name: str, counts: bool) -> None:
        here.barrier()
        began = time.perf_counter()
        acts[name]()
        if counts:
            readings[name].append(time.perf_counter() - began)

    def parts(counts: bool) -> None:
        here.barrier()
        for part, seconds in plain.step().items():
            if counts:
                readings[part].append(seconds)

    yield parts
    for name in acts:
        yield lambda counts, name=name: whole(name, counts)


class Plain:
    """A network and AdamW with nothing around them, on one batch again and again."""

    def __init__(self, case: Case, here: World) -> None:
        self.task = _task(case)
        self._batch = synthetic.batch(case.batch, case.image_size, CHECKED_CLASSES, here.device)
        self._optimizer = torch.optim.AdamW(self.task.model.parameters(), lr=1e-6, fused=True)
        self.task.model.train()

    def step(self) -> dict[str, float]:
        """Seconds by part."""
        began = time.perf_counter()
        loss = self.task.losses(self.task.model, self._batch).sum()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        ended = time.perf_counter()
        return {"forward": forward - began, "backward": backward - forward, "optimizer": ended - backward}


def burst(here: World) -> None:
    """Small all-gathers as stage 3 asks for them after the update: all at once, each by itself."""
    own = torch.zeros(1)
    works = [dist.all_gather_into_tensor(torch.empty(here.size), own, async_op=True) for _ in range(BURST)]
    for work in works:
        assert work
        work.wait()


def collectives(here: World) -> dict[str, Callable[[], object]]:
    """By kind and bytes: of the whole tensor, which is what goes in or comes out."""
    acts: dict[str, Callable[[], object]] = {}
    for num_bytes in COLLECTIVE_BYTES:
        whole = torch.zeros(max(here.size, num_bytes // 4))
        part = torch.zeros(len(whole) // here.size)
        acts[f"all_reduce {num_bytes}"] = lambda whole=whole: dist.all_reduce(whole)
        acts[f"all_gather {num_bytes}"] = lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part)
        acts[f"reduce_scatter {num_bytes}"] = lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole)
    return acts


class Traffic(TorchDispatchMode):
    """Notes kind and bytes of each collective that is called inside `with`; bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in KINDS:
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls.append((KINDS[func._opname], max(sizes)))
        return func(*args, **(kwargs or {}))


def engine_step(case: Case, setting: Setting, here: World) -> Callable[[], object]:
    """A step of training on one batch. Stage 3 has seen the order of the modules by then. Collective."""
    batches = [synthetic.batch(case.batch, case.image_size, CHECKED_CLASSES, here.device)]
    numbers = itertools.count()
    engine = Engine(case.config(setting, here.size), _task(case), here, lambda step: batches)

    def step() -> object:
        return engine.step(batches, step=next(numbers), lr=1e-6)

    for _ in range(3):
        step()
    return step


def _task(case: Case) -> ClassificationTask:
    return ClassificationTask(build_model(case.config().model, case.image_size, CHECKED_CLASSES))


if __name__ == "__main__":
    main()
