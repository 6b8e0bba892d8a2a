"""The interfaces that the loop needs: a task to train, its metric, and listeners to which it reports.

`pipeline.train` imports neither a task nor MLflow; `pipeline.job` joins them through these protocols.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.answers import AnswerOptions, Seen
from pipeline.feed.loader import MicroBatch
from pipeline.world import World


class Metric(Protocol):
    """Collects one evaluation. Results are exact over ranks: every sample counts once, and none of zero weight."""

    def update(self, outputs: Any, targets: Any, weights: Tensor) -> None: ...

    def result(self, world: World) -> dict[str, float]:
        """Returns the scores, the same on every rank. Collective."""
        ...


class Task(Protocol):
    """What differs between tasks: the network, its loss, its answers, its metric."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """The drop-path rate of each residual branch, where the network takes its masks as an input; else empty."""
        ...

    @property
    def main_metric(self) -> str:
        """The metric's result by which checkpoints are compared: higher is better."""
        ...

    @property
    def chance_loss(self) -> float | None:
        """The loss of a network that has learnt nothing; None where no such number is known."""
        ...

    @property
    def depths(self) -> Mapping[str, int]:
        """The layer of each of the backbone's parameters by name, for optim.layer_decay. The stem is layer 0."""
        ...

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns the loss of each sample, [N] float32. Called under autocast."""
        ...

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Any:
        """Returns what the metric is given. `model` is in evaluation mode, and the targets must not be used."""
        ...

    def answers(
        self,
        outputs: Any,
        seen: Sequence[Seen],
        classes: Sequence[str],
        options: AnswerOptions,
    ) -> list[dict[str, Any]]:
        """Returns what the outputs say about each image, in the columns that the served model answers."""
        ...

    def metric(self) -> Metric: ...


class Listener(Protocol):
    """Receives reports of a run on rank 0. It must neither raise for faults of its own nor keep the loop waiting."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, step: int, folder: Path) -> None: ...
