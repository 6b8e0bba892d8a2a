"""Weights of the classes in a classifier's loss, against imbalance.

    task.class_weights, indices of the training data ──▶ weights [K], mean 1 over the samples ──▶ ClassificationTask

With a mean of 1 the loss and the learning rate keep their scale. K is the number of classes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import ClassificationConfig, Config
from pipeline.config.fields import ClassWeights
from pipeline.errors import InputError
from pipeline.protocols import Task
from pipeline.shards.index import ShardSet
from pipeline.tasks.classify import ClassificationTask
from pipeline.world import World

Array = npt.NDArray[np.float64]


def weigh_classes(config: Config, training: ShardSet, task: Task, world: World) -> None:
    """Gives the task the weights that task.class_weights asks for, if any, and their loss of guessing. Collective."""
    if not isinstance(config.task, ClassificationConfig) or config.task.class_weights is None:
        return
    setting = config.task.class_weights

    def compute() -> tuple[Array, float] | None:
        # The index of every shard is read, by one rank.
        if not world.is_first:
            return None
        shares = class_shares(training, [source.weight for source in config.data.train])
        weights = class_weights(setting, training.classes, shares)
        return weights, guessing_loss(weights, shares, config.mix.label_smoothing)

    computed = world.from_first(world.first_then_all(compute))
    assert computed is not None
    assert isinstance(task, ClassificationTask)
    weights, task.chance_loss = computed
    task.class_weights = torch.tensor(weights, dtype=torch.float32, device=world.device)


def class_shares(training: ShardSet, source_weights: Sequence[float]) -> Array:
    """Returns the share of each class in the samples that training draws, [K], from data sets mixed by weight."""
    num_classes = len(training.classes)
    shares = np.zeros(num_classes)
    shard = 0
    for weight, samples in zip(source_weights, training.part_samples, strict=True):
        counts = np.zeros(num_classes, np.int64)
        for _ in samples:
            counts += np.bincount(training.index(shard)["label"], minlength=num_classes)
            shard += 1
        shares += weight * counts / counts.sum()
    return shares / shares.sum()


def class_weights(setting: ClassWeights, classes: list[str], shares: Array) -> Array:
    """Returns the weights, [K], with a mean of 1 over the samples. Raises InputError where that mean would be 0."""
    if setting == "balanced":
        # As scikit-learn's. Only smoothed labels can notice the 0 of a class without samples.
        weights = np.zeros_like(shares)
        np.divide(1, shares, out=weights, where=shares > 0)
    else:
        numbers = [setting[name] for name in classes] if isinstance(setting, dict) else setting
        weights = np.array(numbers, np.float64)
    mean = weights @ shares
    if not mean > 0:
        raise InputError(f"task.class_weights: {setting!r} is 0 for every class that has samples: give one a weight")
    return weights / mean


def guessing_loss(weights: Array, shares: Array, label_smoothing: float) -> float:
    """Returns the weighted loss of the best constant prediction, for balanced weights and hard labels ln K."""
    # The mean target of the samples, which mixing leaves as it is.
    target = (1 - label_smoothing) * shares + label_smoothing / len(shares)
    mass = weights * target
    mass = mass[mass > 0]
    prediction = mass / mass.sum()
    return float(-mass @ np.log(prediction))
