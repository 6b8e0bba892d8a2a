"""A .pt2 archive of torch.export: the graph as JSON, tensors as raw bytes, and the classes and preprocessing.

torch.export.load unpickles example inputs and tensors of unusual kinds. This archive has none of either.
"""

import json
from pathlib import Path

import torch

from pipeline import files
from pipeline.track.export.check import Opened
from pipeline.track.export.source import PREPROCESSING, Source
from pipeline.track.export.traced import trace

_FILE = "model.pt2"


def write(source: Source, folder: Path) -> dict[str, str]:
    source.require_graph("torch-export")
    program = trace(source)
    program.example_inputs = None
    about = json.dumps(source.describe(source.varying), indent=2) + "\n"
    torch.export.save(program, folder / _FILE, extra_files={PREPROCESSING: about})
    files.write(folder / PREPROCESSING, about.encode())
    return source.varying


def load(source: Source, folder: Path) -> Opened:
    return Opened(torch.export.load(folder / _FILE).module())


def call(source: Source, folder: Path) -> str:
    return f"model = torch.export.load({str(folder / _FILE)!r}).module()"
