"""An exponential moving average of the weights: what is evaluated and registered where one is kept."""

import torch
from torch import Tensor

from pipeline.train.engine import Engine


class Ema:
    """average ← d · average + (1 - d) · weights after every applied step.

    d is `decay`, but (1 + n) / (10 + n) at the n-th update while that is less, so that the first weights are soon
    forgotten (as TensorFlow's ExponentialMovingAverage does with num_updates). At ZeRO stage 3 every rank averages
    its partition.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        weights = engine.local_weights()
        # In one allocation, which is saved with one copy.
        parts = torch.cat([tensor.flatten() for tensor in weights.values()]).split(
            [w.numel() for w in weights.values()]
        )
        self._average = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        averages, weights = list(self._average.values()), list(self._engine.local_weights().values())
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def weights(self) -> dict[str, Tensor]:
        """The network's full state with the averages for its trained parameters. Collective at stage 3."""
        return self._engine.weights(self._average)

    def load(self, weights: dict[str, Tensor], steps: int) -> None:
        """Put back what `weights` gave."""
        for name, average in self._average.items():
            average.copy_(self._engine.part_of(name, weights[name]))
        self.steps = steps
