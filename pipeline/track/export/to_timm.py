"""Exports a folder that timm reads: config.json with the labels and the preprocessing, and the weights."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from pipeline import files
from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import ExportSource
from pipeline.track.model_card import WEIGHTS


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    source.require_classifier("timm")
    shutil.copyfile(source.weights, folder / WEIGHTS)
    files.write(folder / "config.json", json.dumps(_build_config(source), indent=2).encode() + b"\n")
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    # timm's users open weights by their file or by the folder. Both have to give the same network.
    by_file = timm.create_model(
        source.card.model.name,
        checkpoint_path=folder / WEIGHTS,
        num_classes=len(source.card.classes),
        **_model_arguments(source),
    ).eval()
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert all(map(torch.equal, by_file.state_dict().values(), by_folder.state_dict().values()))
    transform: Any = create_transform(**resolve_model_data_config(by_folder))
    return OpenedExport(by_folder, transform)


def call(source: ExportSource, folder: Path) -> str:
    return f"import pvt, timm; model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"


def _build_config(source: ExportSource) -> dict[str, Any]:
    image = source.card.image
    own = cast(dict[str, Any], source.network.pretrained_cfg)
    num_classes = len(source.card.classes)
    return {
        "architecture": source.card.model.name,
        "num_classes": num_classes,
        "num_features": source.network.num_features,
        "label_names": source.card.classes,
        "model_args": _model_arguments(source),
        "pretrained_cfg": {
            "input_size": (3, image.size, image.size),
            "fixed_input_size": bool(own.get("fixed_input_size")),
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
            "crop_mode": "center",
            "mean": image.mean,
            "std": image.std,
            "num_classes": num_classes,
            "first_conv": own["first_conv"],
            "classifier": own["classifier"],
        },
    }


def _model_arguments(source: ExportSource) -> dict[str, Any]:
    """Returns the image size for networks that are built for one. Purely convolutional networks are not."""
    parameters = inspect.signature(type(source.network)).parameters
    return {"img_size": source.card.image.size} if "img_size" in parameters else {}
