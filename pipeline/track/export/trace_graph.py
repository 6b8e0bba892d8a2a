"""Traces a network into a graph of tensor operations that holds nothing of the machine that made it.

The graph takes any number of images and, where the network takes several sizes, any of those.
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
    """Returns the graph. Its axes are called batch and, where they vary, d*h and d*w for multiples of d pixels."""
    network = source.build()
    divisor = source.size_divisor
    graph = source.graph(network).eval()
    height = width = max(source.card.image.size, graph.smallest_side)
    batch = Dim("batch")
    varying: dict[int, Any] = {0: batch}
    if divisor:
        _always_resize(network)
        # The example differs from the training size and is not square: torch.export takes equal numbers for constants.
        height += divisor
        width += 2 * divisor
        least = -(-graph.smallest_side // divisor)
        varying[2] = divisor * Dim("h", min=least)
        varying[3] = divisor * Dim("w", min=least)
    examples = {
        IMAGE: torch.zeros(2, 3, height, width),
        EXTENT: torch.tensor([[height, width]] * 2),
    }
    shapes = {
        IMAGE: varying,
        EXTENT: {0: batch},
    }
    trace = functools.partial(
        torch.export.export,
        graph,
        tuple(examples[name] for name in graph.inputs),
        dynamic_shapes=tuple(shapes[name] for name in graph.inputs),
    )
    try:
        program = trace()
    except UserError:
        # The default tracer takes some results of Python code for constants; the strict one follows the code.
        program = trace(strict=True)
    for node in program.graph.nodes:
        # Stack traces name paths on this machine.
        node.meta.pop("stack_trace", None)
    return program


def _always_resize(network: nn.Module) -> None:
    """Makes stages resize their position embeddings also where that changes nothing.

    A stage compares grids to skip the resize, and a graph for all sizes cannot branch. This is a network of its own,
    which `source.build` made, so no other user of the class is affected.
    """
    for stage in network.modules():
        if isinstance(stage, Stage):
            stage._pos_embed_on = functools.partial(_resize_embedding, stage)


def _resize_embedding(stage: Stage, grid: Grid) -> Tensor:
    return _resize_pos_embed(stage.pos_embed, stage.grid, grid)
