"""What the loop asks of others: a task to train, and listeners to tell.

The train room knows neither a task's head nor MLflow; `launch` joins them through these protocols.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.feed.loader import MicroBatch
from pipeline.world import World


class Metric(Protocol):
    """Collects one evaluation. Results are exact over ranks: every sample counts once, weightless ones never."""

    def update(self, outputs: Any, targets: Any, weights: Tensor) -> None: ...

    def result(self, world: World) -> dict[str, float]:
        """Collective: the same numbers on every rank."""
        ...


class Task(Protocol):
    """What differs between jobs: the network, its loss, its metric."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of each residual branch, where the network takes its drop-path masks from outside; else empty."""
        ...

    @property
    def main_metric(self) -> str:
        """Which of the metric's results tells the better checkpoint: the higher one."""
        ...

    @property
    def chance_loss(self) -> float | None:
        """Of a network that has learnt nothing; None where no such number is known."""
        ...

    @property
    def depths(self) -> Mapping[str, int]:
        """Layer of each of the backbone's parameters by name, from the stem's 0 on, for optim.layer_decay."""
        ...

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """The loss of each sample, [N] float32. Called under autocast."""
        ...

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Any:
        """What the metric is given. `model` is in evaluation mode, and the targets are not to be looked at."""
        ...

    def metric(self) -> Metric: ...


class Listener(Protocol):
    """Is told, on rank 0, what happens in a run. Must not raise for troubles of its own, nor keep the loop waiting."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, step: int, folder: Path) -> None: ...
