"""The task that a configuration, or a registered model, names."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pipeline import config
from pipeline.errors import InputError
from pipeline.tasks import classify, segment
from pipeline.tasks.classify import Classification
from pipeline.tasks.layers import freeze
from pipeline.tasks.segment import Segmentation

AnyTask = Classification | Segmentation


def build_task(task: config.Task, model: config.Model, image: config.Image, classes: list[str]) -> AnyTask:
    """With a network freshly initialised from torch's current seed. Raises InputError for one that cannot be built."""
    if isinstance(task, config.SemanticFpn):
        built = Segmentation(segment.build_model(model, task, image.size, len(classes)), classes)
        freeze(built.model.backbone, model.frozen_stages)
    else:
        built = Classification(classify.build_model(model, image.size, len(classes)), len(classes))
        freeze(built.model, model.frozen_stages)
    return built


def build_trained(
    task: config.Task, model: config.Model, image: config.Image, classes: list[str], weights: Path
) -> AnyTask:
    """With the weights of a safetensors file, in evaluation mode."""
    built = build_task(task, model, image, classes)
    built.model.load_state_dict(safetensors.torch.load_file(weights))
    built.model.eval()
    return built


def start_from(
    task: AnyTask,
    model: config.Model,
    classes: list[str],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    source_task: config.Task,
    source_classes: list[str],
) -> None:
    """Load the backbone of a registered model, and its head where task and classes are the same.

    Raises InputError, which names `source`, for weights that do not fit and a task that they cannot be used for.
    """
    keep_head = source_classes == classes
    if isinstance(task, Segmentation) == isinstance(source_task, config.SemanticFpn):
        classify.load_pretrained(task.model, weights, source, keep_head=keep_head)
    elif isinstance(task, Segmentation):
        segment.load_backbone(task.model, model, weights, source)
    else:
        raise InputError(
            f"{source} is a {source_task.name}, without what a classifier needs behind the last map: start from a "
            "classifier"
        )
