"""An ONNX graph in fp32, with classes and preprocessing in its metadata and, to read them without ONNX, beside it."""

import json
from pathlib import Path

import onnxruntime
import onnxscript  # noqa: F401 - what torch exports with
import torch
from torch import Tensor
from torch.onnx import ONNXProgram

from pipeline import files
from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import PREPROCESSING, ExportSource
from pipeline.track.export.trace_graph import trace_graph

_FILE = "model.onnx"


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    source.require_graph("onnx")
    graph = source.graph()
    program = torch.onnx.export(
        trace_graph(source), input_names=graph.inputs, output_names=list(graph.outputs), verbose=False
    )
    assert program is not None
    _name_axes(program)
    about = source.describe(source.varying)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(folder / _FILE)
    files.write(folder / PREPROCESSING, json.dumps(about, indent=2).encode() + b"\n")
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / _FILE, options, providers=["CPUExecutionProvider"])

    names, outputs = source.graph().inputs, list(source.graph().outputs)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        fed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(outputs, fed)))

    return OpenedExport(run)


def call(source: ExportSource, folder: Path) -> str:
    return f"session = onnxruntime.InferenceSession({str(folder / _FILE)!r})"


def _name_axes(program: ONNXProgram) -> None:
    """As traced.py calls them; torch has numbered them."""
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    named = zip(shape, ("batch", "channels", "h", "w"), strict=True)
    # An axis is s7, or 32*s8 for multiples of 32.
    program.rename_axes({str(axis.value).split("*")[-1]: name for axis, name in named if not isinstance(axis, int)})
