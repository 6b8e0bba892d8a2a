"""Exports a .pt2 archive of torch.export: the graph as JSON, tensors as raw bytes, the classes and the preprocessing.

torch.export.load unpickles example inputs and tensors of unusual kinds. This archive holds neither.
"""

import json
from pathlib import Path

import torch

from pipeline import files
from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import PREPROCESSING, ExportSource
from pipeline.track.export.trace_graph import trace_graph

_FILE = "model.pt2"


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    source.require_graph("torch-export")
    program = trace_graph(source)
    # Examples would be stored as a pickle.
    program.example_inputs = None
    description = json.dumps(source.describe(source.varying), indent=2) + "\n"
    torch.export.save(
        program,
        folder / _FILE,
        extra_files={PREPROCESSING: description},
    )
    files.write(folder / PREPROCESSING, description.encode())
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    return OpenedExport(torch.export.load(folder / _FILE).module())


def call(source: ExportSource, folder: Path) -> str:
    return f"model = torch.export.load({str(folder / _FILE)!r}).module()"
