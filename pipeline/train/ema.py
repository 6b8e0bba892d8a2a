"""The exponential moving average of the weights. Where a run keeps one, it is evaluated and registered."""

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
        self._engine = engine
        self._decay = decay
        weights = engine.local_weights()
        # In one allocation, which a checkpoint copies to the host at once.
        flat = torch.cat([tensor.flatten() for tensor in weights.values()])
        self._average: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            average, flat = flat.tensor_split([tensor.numel()])
            self._average[name] = average.view_as(tensor)
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        early = (1 + self.steps) / (10 + self.steps)
        decay = min(self._decay, early)
        averages = list(self._average.values())
        weights = list(self._engine.local_weights().values())
        # One kernel for all tensors, not one for each.
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def weights(self) -> dict[str, Tensor]:
        """Returns the network's full state with the averages for its trained parameters. Collective at stage 3."""
        return self._engine.weights(self._average)

    def load(self, weights: dict[str, Tensor], steps: int) -> None:
        """Puts back what `weights` gave."""
        for name, average in self._average.items():
            average.copy_(self._engine.partition_of(name, weights[name]))
        self.steps = steps
