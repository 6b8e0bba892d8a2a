"""The version's own files: weights, also the raw ones beside a moving average, and model.json."""

import shutil
from pathlib import Path

from pipeline.track import network
from pipeline.track.card import CARD, WEIGHTS
from pipeline.track.export.check import Opened
from pipeline.track.export.source import Source


def write(source: Source, folder: Path) -> dict[str, str]:
    for name in (CARD, *source.card.sha256):
        shutil.copyfile(source.folder / name, folder / name)
    return source.varying


def load(source: Source, folder: Path) -> Opened:
    return Opened(source.graph(network.load(source.card, folder / WEIGHTS)))


def call(source: Source, folder: Path) -> str:
    return f"state_dict = safetensors.torch.load_file({str(folder / WEIGHTS)!r})"
