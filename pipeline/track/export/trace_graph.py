"""The network as a graph of tensor operations, with nothing in it of the machine that made it.

For images in any number and, where the network takes several sizes, of any of those.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from pipeline.track.export.graphs import EXTENT, IMAGE
from pipeline.track.export.source import ExportSource
from pvt.model import Grid, Stage, _resize_pos_embed


def trace_graph(source: ExportSource) -> ExportedProgram:
    """Its axes are called batch and, where they vary, d*h and d*w for multiples of d pixels."""
    network, divisor = source.build(), source.size_divisor
    graph = source.graph(network).eval()
    height = width = max(source.card.image.size, graph.smallest_side)
    batch = Dim("batch")
    varying: dict[int, Any] = {0: batch}
    if divisor:
        _resize_always(network)
        # Other than in training and not equal, so that nothing is taken for a constant.
        height, width = height + divisor, width + 2 * divisor
        least = -(-graph.smallest_side // divisor)
        varying |= {2: divisor * Dim("h", min=least), 3: divisor * Dim("w", min=least)}
    example = {IMAGE: torch.zeros(2, 3, height, width), EXTENT: torch.tensor([[height, width]] * 2)}
    arguments = tuple(example[name] for name in graph.inputs)
    shapes = tuple({IMAGE: varying, EXTENT: {0: batch}}[name] for name in graph.inputs)
    try:
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes)
    except UserError:  # Python code that the quick way of tracing takes for constants
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine
    return program


def _resize_always(network: nn.Module) -> None:
    """Resize position embeddings also where that changes nothing: a graph cannot choose."""
    for stage in network.modules():
        if isinstance(stage, Stage):
            stage._pos_embed_on = functools.partial(_resized, stage)


def _resized(stage: Stage, grid: Grid) -> Tensor:
    return _resize_pos_embed(stage.pos_embed, stage.grid, grid)
