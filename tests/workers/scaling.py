"""What DeepSpeed calls and copies in a step, by setting of benchmarks.scaling: a JSON object on rank 0."""

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import CHECKED_SETTINGS, SETTINGS, SMALL
from benchmarks.scaling_ranks import Plain, Traffic, engine_step
from pipeline import world


class Copies(TorchDispatchMode):
    """Sums up the bytes that are written by copying, scaling and converting."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._opname in ("cat", "clone", "copy_", "_to_copy", "div_", "mul_") and isinstance(out, Tensor):
            self.num_bytes += out.nbytes
        return out


def copied(step: Callable[[], object]) -> int:
    with Copies() as copies:
        step()
    return copies.num_bytes


here = world.start()
found = {}
for name in CHECKED_SETTINGS:
    step, plain = engine_step(SMALL, SETTINGS[name], here), Plain(SMALL, here)
    with Traffic() as traffic:
        step()
    found[name] = {"calls": traffic.calls, "copied": copied(step) - copied(plain.step)}
if here.is_first:
    print(json.dumps(found), flush=True)
world.stop()
