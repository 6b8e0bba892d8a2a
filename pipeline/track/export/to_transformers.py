"""Exports PVT v1 as Transformers has it, PvtForImageClassification, with an image processor.

Transformers has one eps for every LayerNorm, 1e-6, where PVT has 1e-5 behind convolutions. Scaling such a convolution
gives the same outputs: with s² = 1e-6 / 1e-5,

    (s·x - s·mean) / √(s²·variance + 1e-6)  =  (x - mean) / √(variance + 1e-5)

Transformers cannot resize position embeddings, so the exported model takes images of one size. Its image processor
gives our pixels, except where a side of the resized image exceeds the crop by 3, 7, 11, … pixels: it then crops one
pixel further up or left.
"""

import math
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PvtConfig, PvtForImageClassification, PvtImageProcessor
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import InputError
from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import ExportSource
from pvt import PyramidVisionTransformer, to_transformers
from pvt.model import Attention, PatchEmbed

# The file is written in an instant.
disable_progress_bar()

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    source.require_classifier("transformers")
    network = source.build()
    if not isinstance(network, PyramidVisionTransformer):
        raise InputError(
            f"{source.uri} is a {source.card.model.name}: Transformers knows no such model, of ours only "
            "pvt_pico, pvt_tiny, pvt_small, pvt_medium and pvt_large; choose another target"
        )
    config = _build_config(source, network)
    _adapt_to_eps(config.layer_norm_eps, network)
    model = PvtForImageClassification(config)
    model.load_state_dict(to_transformers(network.state_dict()))
    model.save_pretrained(folder)
    _build_processor(source).save_pretrained(folder)
    return {"batch": "any"}


def load(source: ExportSource, folder: Path) -> OpenedExport:
    model = PvtForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def logits(images: Tensor) -> Tensor:
        return model(images).logits

    def pixels(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    return OpenedExport(logits, pixels)


def call(source: ExportSource, folder: Path) -> str:
    return f"model = transformers.PvtForImageClassification.from_pretrained({str(folder)!r})"


def _adapt_to_eps(eps: float, network: PyramidVisionTransformer) -> None:
    """Scales convolutions so that a LayerNorm of this eps behind them gives the outputs of the present one."""
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            conv = module.proj
            norm = module.norm
        elif isinstance(module, Attention) and module.sr is not None and module.norm is not None:
            conv = module.sr
            norm = module.norm
        else:
            continue
        # s in the formula at the head of this file.
        scale = math.sqrt(eps / norm.eps)
        for parameter in conv.parameters():
            parameter.mul_(scale)


def _build_config(source: ExportSource, network: PyramidVisionTransformer) -> PvtConfig:
    classes = source.card.classes
    stages: Any = network.stages
    # All blocks of a stage have the same shape.
    firsts = [stage.blocks[0] for stage in stages]
    return PvtConfig(
        image_size=source.card.image.size,
        depths=list(network.depths),
        hidden_sizes=[info["num_chs"] for info in network.feature_info],
        num_attention_heads=[block.attn.num_heads for block in firsts],
        mlp_ratios=[block.mlp.fc1.out_features // block.mlp.fc1.in_features for block in firsts],
        sequence_reduction_ratios=[block.attn.sr.stride[0] if block.attn.sr else 1 for block in firsts],
        drop_path_rate=source.card.model.drop_path_rate,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )


def _build_processor(source: ExportSource) -> PvtImageProcessor:
    image = source.card.image
    return PvtImageProcessor(
        do_convert_rgb=True,
        default_to_square=False,
        size={"shortest_edge": source.short_side},
        resample=_RESAMPLE[image.interpolation],
        do_center_crop=True,
        crop_size={"height": image.size, "width": image.size},
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
