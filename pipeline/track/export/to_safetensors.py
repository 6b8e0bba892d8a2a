"""Exports the version's own files: the weights, the raw ones beside a moving average, and model.json."""

import shutil
from pathlib import Path

from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import ExportSource
from pipeline.track.model_card import CARD, WEIGHTS
from pipeline.track.serve import load_network


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    for name in (CARD, *source.card.sha256):
        shutil.copyfile(source.folder / name, folder / name)
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    return OpenedExport(source.graph(load_network.load_network(source.card, folder / WEIGHTS)))


def call(source: ExportSource, folder: Path) -> str:
    return f"state_dict = safetensors.torch.load_file({str(folder / WEIGHTS)!r})"
