"""Makes the network that a task and a model's settings describe. No other module does."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import nn

from pipeline import flops
from pipeline.config import (
    AnchorBasedConfig,
    ClassificationConfig,
    DetrConfig,
    MaskRcnnConfig,
    ModelConfig,
    RetinaNetConfig,
    SemanticFpnConfig,
    TaskConfig,
)
from pipeline.errors import InputError, needing
from pvt.create import create_model
from pvt.dense import backbone
from pvt.mask_rcnn import MaskRcnn
from pvt.retinanet import RetinaNet
from pvt.semantic_fpn import SemanticFpn


def build(task: TaskConfig, model: ModelConfig, image_size: int, num_classes: int) -> Any:
    """Returns a network initialised from torch's current seed, in training mode, for images of `image_size` pixels.

    It maps images [B, 3, H, W] to logits: [B, K] for classification and [B, K, H / 4, W / 4] for semantic_fpn. The
    output of a detector is described in pvt.detector. From here on this process computes fp32 in full precision. Raises
    InputError for a name that timm does not know, and a size or a setting that the model does not take.
    """
    _disable_tf32()
    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), n=3)
        raise InputError(f"model.name {model.name!r} is no timm model; near: {', '.join(near) or 'none'}")
    try:
        network: Any = NETWORKS[task.name](task, model, image_size, num_classes)
    except TypeError as error:
        # The architecture does not take one of the settings.
        raise InputError(f"model.name {model.name!r} cannot be built here: {error}") from error
    except (ValueError, AssertionError, RuntimeError) as error:
        # A size that the architecture does not take, or, a RuntimeError, one that there is no memory for.
        size = model.image_size or image_size
        raise InputError(f"model.name {model.name!r} for {size} px: {error}") from error
    if model.grad_checkpointing:
        network.set_grad_checkpointing()
    return network


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file by name. Raises InputError for a damaged file."""
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read as weights: {error}; register the model again") from error


def load_weights(network: nn.Module, file: Path) -> None:
    """Loads the weights in a safetensors file. Raises InputError for a damaged file and for weights of another
    network."""
    try:
        network.load_state_dict(read_weights(file))
    except RuntimeError as error:
        # torch's message has a line for each tensor.
        message = " ".join(str(error).split())
        why = message[:300]
        raise InputError(f"{file}: are not the weights of the network beside them: {why}") from error


def _disable_tf32() -> None:
    """Makes torch compute fp32 in full precision on GPUs.

    Its default for convolutions is TF32, with 10 bits of the mantissa instead of 23, and NVIDIA's containers set the
    same for matrix products (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    # These are torch's older names. With the newer ones, `fp32_precision`, torch.backends.cudnn.flags raises.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def training_flops(task: TaskConfig, model: ModelConfig, image_size: int, num_classes: int) -> int:
    """Returns the floating-point operations of training on one image of `image_size` pixels, see pipeline/flops.py."""
    return flops.training_flops(lambda: build(task, model, image_size, num_classes), image_size)


def _build_classifier(task: ClassificationConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    return create_model(
        model.name,
        image_size,
        num_classes=num_classes,
        drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
    )


def _build_pyramid(model: ModelConfig, image_size: int) -> nn.Module:
    """Returns the backbone of a dense network."""
    return backbone(model.name, model.image_size or image_size, model.drop_path_rate)


def _build_semantic_fpn(task: SemanticFpnConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    pyramid = _build_pyramid(model, image_size)
    return SemanticFpn(pyramid, num_classes, task.channels, task.dropout, task.pyramid_channels)


def _build_retinanet(task: RetinaNetConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    return RetinaNet(_build_pyramid(model, image_size), num_classes, **_anchor_settings(task))


def _build_mask_rcnn(task: MaskRcnnConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    return MaskRcnn(
        _build_pyramid(model, image_size),
        num_classes,
        **_anchor_settings(task),
        box_width=task.box_width,
        mask_width=task.mask_width,
        sampled_boxes=task.sampled_boxes,
    )


def _anchor_settings(task: AnchorBasedConfig) -> dict[str, Any]:
    return {
        "pyramid_channels": task.pyramid_channels,
        "smallest_anchor": task.smallest_anchor,
        "min_score": task.min_score,
        "max_overlap": task.max_overlap,
        "max_detections": task.max_detections,
    }


def _build_detr(task: DetrConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    with needing("detr", "task detr"):
        # Imported here, because it imports transformers, which takes seconds.
        from pvt.detr import Detr

    return Detr(
        _build_pyramid(model, image_size),
        num_classes,
        queries=task.queries,
        width=task.width,
        heads=task.heads,
        encoder_layers=task.encoder_layers,
        decoder_layers=task.decoder_layers,
        feedforward=task.feedforward,
        dropout=task.dropout,
        max_detections=task.max_detections,
    )


NETWORKS: dict[str, Callable[[Any, ModelConfig, int, int], nn.Module]] = {
    "classification": _build_classifier,
    "semantic_fpn": _build_semantic_fpn,
    "retinanet": _build_retinanet,
    "mask_rcnn": _build_mask_rcnn,
    "detr": _build_detr,
}
"""What builds each task's network from the task's section, the model's, the image size and the number of classes."""
