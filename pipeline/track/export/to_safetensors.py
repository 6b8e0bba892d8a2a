"""The version's own files: weights, also the raw ones beside a moving average, and model.json."""

import shutil
from pathlib import Path

import safetensors.torch
import timm

from pipeline.track.card import CARD, WEIGHTS
from pipeline.track.export.check import Opened
from pipeline.track.export.source import Source


def write(source: Source, folder: Path) -> dict[str, str]:
    for name in (CARD, *source.card.sha256):
        shutil.copyfile(source.folder / name, folder / name)
    return source.varying


def load(source: Source, folder: Path) -> Opened:
    network = timm.create_model(source.card.model.name, **source.arguments).eval()
    network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return Opened(network)


def call(source: Source, folder: Path) -> str:
    return f"state_dict = safetensors.torch.load_file({str(folder / WEIGHTS)!r})"
