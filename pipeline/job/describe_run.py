"""Describes what a run is going to do, before it does it: its data, steps, images, network and padding."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import ClassificationConfig, Config
from pipeline.feed.order import Order, padding_waste
from pipeline.shards.index import ShardSet
from pipeline.train.schedule import Schedule

log = logging.getLogger(__name__)

MAX_COUNTED_SHARDS = 2000
"""The shards of the largest data set whose classes are counted: of more, reading the indices takes seconds."""
STATE_BYTES = 16
"""The bytes of a parameter with its gradient and Adam's two moments, each in fp32."""


def describe_run(
    config: Config, training: ShardSet, validation: ShardSet | None, order: Order, ranks: int, num_parameters: int
) -> dict[str, str]:
    """Returns a line for each subject. Warns of a run of less than a tenth of the steps that its settings are for."""
    schedule = Schedule.of(config, order.steps_per_epoch)
    recipe = config.train.recipe_steps
    if recipe and schedule.total < recipe / 10:
        log.warning(
            f"train.length {config.train.length} is {schedule.total:,} steps of these data, and the settings are for "
            f"{recipe:,} (train.recipe_steps): begin with configs/own.yaml; see docs/data.md, Small data sets"
        )
    return {
        "data": _describe_data(training, validation),
        "steps": f"{schedule.total:,} steps of {config.train.global_batch_size:,} images ({order.steps_per_epoch:,} an "
        f"epoch), world size {ranks}, warm-up {schedule.warmup:,}",
        "images": f"{config.image.size} px, {_describe_augmentation(config)}",
        "network": f"{config.model.name}, {num_parameters:,} trainable parameters: with gradients and moments "
        f"{STATE_BYTES * num_parameters / 1e9:.2g} GB, and activations on top",
        "padding": padding(order, ranks, config) or "no padding",
    }


def _describe_data(training: ShardSet, validation: ShardSet | None) -> str:
    """Returns the numbers of samples and classes and, of labelled images on a disk, how unequal the classes are."""
    text = f"{len(training):,} training samples of {len(training.classes):,} classes"
    counts = _count_labels(training)
    if counts is not None:
        most, least = int(counts.argmax()), int(counts.argmin())
        largest, smallest = training.classes[most], training.classes[least]
        share = counts[most] / counts.sum()
        text += f", from {counts[least]:,} of {smallest} to {counts[most]:,} of {largest}, which is {share:.1%}"
    if validation is None:
        return f"{text}; no validation data, so no score"
    return f"{text}; {len(validation):,} validation samples"


def _count_labels(shards: ShardSet) -> npt.NDArray[np.int64] | None:
    """Returns the number of samples of each class, [classes]; None where counting them would take a while."""
    num_shards = len(shards.shard_samples)
    if shards.annotations or shards.is_remote or num_shards > MAX_COUNTED_SHARDS:
        return None
    counts = [np.bincount(shards.index(shard)["label"], minlength=len(shards.classes)) for shard in range(num_shards)]
    return np.sum(counts, axis=0)


def _describe_augmentation(config: Config) -> str:
    """Returns the settings that change training images: crops and flips, and those that are not the defaults."""
    settings: dict[str, Any] = {"hflip": config.augment.hflip}
    if isinstance(config.task, ClassificationConfig):
        settings |= {"crop": config.augment.crop, "crop_scale": config.augment.crop_scale}
    settings |= config.augment.model_dump(mode="json", exclude_defaults=True)
    settings |= config.mix.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def padding(order: Order, ranks: int, config: Config) -> str:
    """Returns the share of work that is padding, and the numbers of ranks that have none; empty where there is none."""
    waste = padding_waste(order, ranks, config)
    if not waste:
        return ""
    # A rank needs at least one lane.
    largest = min(2 * ranks, order.lanes)
    better = [str(size) for size in range(1, largest + 1) if not padding_waste(order, size, config)]
    sizes = ", ".join(better) or "none up to double"
    return f"{waste:.1%} of the work is padding; ranks without any: {sizes}"
