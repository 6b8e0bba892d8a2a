"""Exports an ONNX graph in fp32. Its metadata and, for those without ONNX, a file beside it hold the preprocessing."""

import json
from pathlib import Path

import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it
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
        trace_graph(source),
        input_names=graph.inputs,
        output_names=list(graph.outputs),
        verbose=False,
    )
    assert program is not None
    _name_axes(program)
    description = source.describe(source.varying)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
    program.save(folder / _FILE)
    files.write(folder / PREPROCESSING, json.dumps(description, indent=2).encode() + b"\n")
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    # By default onnxruntime uses all cores, also where this process may use fewer.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / _FILE,
        options,
        providers=["CPUExecutionProvider"],
    )
    graph = source.graph()
    outputs = list(graph.outputs)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(outputs, feed)))

    return OpenedExport(run)


def call(source: ExportSource, folder: Path) -> str:
    return f"session = onnxruntime.InferenceSession({str(folder / _FILE)!r})"


def _name_axes(program: ONNXProgram) -> None:
    """Gives the axes the names that trace_graph.py gave them; torch numbers them instead."""
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    names = {}
    for axis, name in zip(shape, ("batch", "channels", "h", "w"), strict=True):
        if not isinstance(axis, int):
            # An axis is s7, or 32*s8 for multiples of 32.
            names[str(axis.value).split("*")[-1]] = name
    program.rename_axes(names)
