"""Builds the task that a configuration, or a registered model, names.

task, model, image, classes ──network.build──▶ network ──freeze──▶ ClassificationTask
                                                                   SegmentationTask, DetectionTask (dense)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import network
from pipeline.config import ImageConfig, ModelConfig, TaskConfig
from pipeline.errors import InputError
from pipeline.protocols import Task
from pipeline.tasks.classify import ClassificationTask
from pipeline.tasks.detect import DetectionTask
from pipeline.tasks.layer_groups import freeze
from pipeline.tasks.pretrained import load_backbone, load_pretrained
from pipeline.tasks.segment import SegmentationTask
from pvt.dense import DenseNetwork
from pvt.model import STRIDES

TASK_CLASSES: dict[str, Callable[[Any, list[str]], Task]] = {
    "classification": ClassificationTask,
    "semantic_fpn": SegmentationTask,
    "retinanet": DetectionTask,
    "mask_rcnn": DetectionTask,
    "detr": DetectionTask,
}
"""The class that trains and scores each task's network. It is made of the network and the names of the classes."""


def build_task(
    task: TaskConfig,
    model: ModelConfig,
    image: ImageConfig,
    classes: list[str],
) -> Task:
    """Returns a task whose network is freshly initialised from torch's current seed.

    Raises InputError for a network that cannot be built.
    """
    if task.is_dense:
        _check_dense(task, model, image.size, len(classes))
    built = network.build(task, model, image.size, len(classes))
    freeze(
        built.backbone if task.is_dense else built,
        model.frozen_stages,
        statistics=model.frozen_statistics,
    )
    return TASK_CLASSES[task.name](built, classes)


def _check_dense(
    task: TaskConfig,
    model: ModelConfig,
    image_size: int,
    num_classes: int,
) -> None:
    """Raises InputError for a setting that dense networks do not have, and for a network of one image size."""
    if model.drop_rate:
        raise InputError(
            f"model.drop_rate {model.drop_rate} is of a classifier's head, which task {task.name} does not have: "
            "remove it; the task's own settings may have a dropout"
        )
    # On the meta device, which takes neither memory nor random draws from the seed.
    with torch.device("meta"), torch.inference_mode():
        dense = network.build(task, model, image_size, num_classes)
        _check_canvases(dense.eval(), model.name, image_size)


def _check_canvases(dense: DenseNetwork, name: str, image_size: int) -> None:
    """Raises InputError unless the network, on the meta device, also takes canvases of another size and shape."""
    height = image_size + STRIDES[-1]
    width = image_size + 2 * STRIDES[-1]
    try:
        dense.maps(torch.empty(1, 3, height, width))
    # Architectures reject a size in whatever way they come upon it.
    except (ValueError, AssertionError, RuntimeError, IndexError) as error:
        raise InputError(
            f"model.name {name!r}: whole images are seen at sizes of their own, but it does not take "
            f"{height}x{width}: {error}"
        ) from error


def build_trained(
    task: TaskConfig,
    model: ModelConfig,
    image: ImageConfig,
    classes: list[str],
    weights: Path,
) -> Task:
    """Returns a task in evaluation mode with the weights of a safetensors file.

    Raises InputError for weights of another network.
    """
    built = build_task(task, model, image, classes)
    network.load_weights(built.model, weights)
    built.model.eval()
    return built


def start_from(
    task: Task,
    config: TaskConfig,
    model: ModelConfig,
    classes: list[str],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    source_task: TaskConfig,
    source_classes: list[str],
) -> None:
    """Loads the backbone of a registered model, and its head where task and classes are the same.

    Raises InputError, which names `source`, for weights that do not fit and for a task that they cannot be used for.
    """
    is_same_task = source_task.name == config.name
    if is_same_task or not (config.is_dense or source_task.is_dense):
        keep_head = is_same_task and source_classes == classes
        load_pretrained(task.model, weights, source, keep_head=keep_head)
        return
    if config.is_dense:
        dense: Any = task.model
        load_backbone(dense, model.name, weights, source)
        return
    # A dense network's backbone is pruned behind its last map.
    raise InputError(
        f"{source} is a {source_task.name}, without the layers that a classifier has behind the last map: start from "
        "a classifier"
    )
