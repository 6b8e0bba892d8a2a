"""The modules that compute a batch's loss or outputs: the one that DeepSpeed wraps, and two for replaced weights."""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.feed.loader import MicroBatch
from pipeline.protocols import Task

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(nn.Module):
    """The module that DeepSpeed wraps: from a batch to the weighted sum of its losses, or to the metric's input."""

    def __init__(self, task: Task, precision: str, device_type: str) -> None:
        super().__init__()
        self.model = task.model
        self._task = task
        self._dtype = _AUTOCAST.get(precision)
        self._device_type = device_type

    def forward(self, batch: MicroBatch, *, evaluates: bool = False) -> Any:
        if evaluates:
            return self.outputs(self.model, batch)
        return self.loss(self.model, batch)

    def loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns the weighted sum of the losses that `model` has on the batch, a scalar."""
        enabled = self._dtype is not None
        with torch.autocast(self._device_type, self._dtype, enabled=enabled):
            losses = self._task.losses(model, batch)
        return (losses * batch.weights).sum()

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Any:
        """Returns what `model` gives the metric for the batch."""
        # Compiled kernels round differently, and an exported model does not have them.
        with torch.compiler.set_stance("force_eager"):
            return self._task.outputs(model, batch)


class ReplicaOutputs(nn.Module):
    """The outputs of another network under the same task. Its weights can be replaced."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._outputs = objective.outputs

    def forward(self, batch: MicroBatch) -> Any:
        return self._outputs(self.model, batch)


class ReplicaGradients(nn.Module):
    """Loss and gradients in one forward call, so that recomputed activations too see the weights it is called with."""

    def __init__(self, objective: Objective, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self._loss = objective.loss
        self._names = names

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        loss = self._loss(self.model, batch)
        parameters = dict(self.model.named_parameters())
        inputs = [parameters[name] for name in self._names]
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        result = dict(zip(self._names, gradients, strict=True))
        result["loss"] = loss.detach()
        return result
