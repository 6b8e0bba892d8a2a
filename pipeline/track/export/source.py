"""The model to export: its network with the registered weights, and the inputs that it gets for images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline import evaluation_view
from pipeline.errors import InputError
from pipeline.evaluation_view import CANVAS_DIVISOR
from pipeline.track.export import graphs
from pipeline.track.export.graphs import BOXES, EXTENT, IMAGE, LOGITS, Graph
from pipeline.track.registry.registry import Version
from pipeline.track.serve import load_network

PREPROCESSING = "preprocessing.json"
"""The file beside a graph that holds what `describe` returns."""


class ExportSource:
    """A registered version that is being exported."""

    def __init__(self, version: Version) -> None:
        self.uri = version.uri
        self.folder = version.folder
        self.card = version.card
        self.card.require_head(self.uri)
        self.weights: Path = version.weights
        self.network = self.build()
        """The network in fp32, in evaluation mode. It must not be changed: exports are compared with it."""

    def build(self) -> nn.Module:
        """Builds another instance of the network, which may be changed."""
        return load_network.load_network(self.card, self.weights)

    def graph(self, network: nn.Module | None = None) -> Graph:
        """Wraps this network, or another of its kind, as the graph that is exported and compared."""
        return graphs.GRAPHS[self.card.task.name](network or self.network)

    @property
    def sees_whole(self) -> bool:
        """Whether the network is shown whole images, and not their centres."""
        return self.card.task.sees_whole_images

    def require_classifier(self, to: str) -> None:
        """Raises InputError for a model of another task, which the format cannot hold."""
        task = self.card.task
        if task.name != "classification":
            others = "onnx, torch-export or " if task.has_fixed_graph else ""
            raise InputError(
                f"--to {to}: cannot hold {task.name}, which {self.uri} is: export it to {others}safetensors"
            )

    def require_graph(self, to: str) -> None:
        """Raises InputError for a network whose operations depend on its input."""
        if not self.card.task.has_fixed_graph:
            raise InputError(
                f"--to {to}: {self.uri} is a mask_rcnn, whose second stage looks at as many regions as the first one "
                "has found, and a graph has operations of fixed shapes: serve it with mlflow (docs/serving.md), or "
                "export it to safetensors and build it with pvt.mask_rcnn"
            )

    @property
    def size_divisor(self) -> int | None:
        """The divisor, in pixels, of the heights and widths that the network takes; None if it takes one size only."""
        # Those of timm do not say.
        return getattr(self.network, "size_divisor", None)

    @property
    def varying(self) -> dict[str, str]:
        """The sizes of the network's input that may vary, each with its permitted values."""
        if self.size_divisor is None:
            return {"batch": "any"}
        smallest = self.graph().smallest_side
        sides = f"multiples of {self.size_divisor}"
        if smallest > 1:
            sides += f", at least {smallest}"
        return {"batch": "any", "height": sides, "width": sides}

    @property
    def short_side(self) -> int:
        """The short side to which evaluation resizes an image before it crops the centre, in pixels."""
        return evaluation_view.short_side_before_crop(self.card.image, self.card.image.size)

    def pixels(self, image: Image.Image, size: int | None = None) -> Tensor:
        """Prepares an RGB image as evaluation does.

        Returns its centre, [3, size, size], by default in the size of training; or the whole image, [3, H, W].
        """
        config = self.card.image
        if self.sees_whole:
            resized = evaluation_view.resize_whole(image, self.card.task, config)
            return evaluation_view.pad_to_canvas(evaluation_view.normalise(resized, config))
        return evaluation_view.normalise(evaluation_view.crop_centre(image, config, size or config.size), config)

    def inputs(self, images: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        """Returns the graph's inputs for these images.

        The first is [N, 3, H, W]; whole images lie on a canvas that holds all of them. A detector also takes the height
        and width of each, [N, 2].
        """
        tensors = [self.pixels(image) for image in images]
        smallest = self.graph().smallest_side if self.sees_whole else 0
        height = max(smallest, *(tensor.shape[1] for tensor in tensors))
        width = max(smallest, *(tensor.shape[2] for tensor in tensors))
        # The canvas is filled with zeros at the bottom and the right, after normalisation, as in evaluation.
        padded = [
            pad(
                tensor,
                (0, width - tensor.shape[2], 0, height - tensor.shape[1]),
            )
            for tensor in tensors
        ]
        batch = torch.stack(padded)
        if EXTENT not in self.graph().inputs:
            return (batch,)
        extents = [
            evaluation_view.whole_size(self.card.task, self.card.image, image.height, image.width) for image in images
        ]
        return batch, torch.tensor(extents)

    def describe(self, varying: dict[str, str]) -> dict[str, Any]:
        """Returns what a program needs to know that has the graph alone: tensors, preprocessing, classes."""
        image = self.card.image
        graph = self.graph()
        tensors = {
            "input": {
                "name": IMAGE,
                "layout": "NCHW",
                "channels": "RGB",
                "dtype": "float32",
                "varying": varying,
            },
            "extent": {
                "name": EXTENT,
                "layout": "N2",
                "dtype": "int64",
                "holds": "height, width before padding",
            },
            "output": {
                "name": LOGITS,
                "layout": graph.outputs[LOGITS],
                "dtype": "float32",
            },
            "boxes": {
                "name": BOXES,
                "layout": "NA4",
                "dtype": "float32",
                "holds": "x1, y1, x2, y2 in padded pixels",
            },
        }
        present = (*graph.inputs, *graph.outputs)
        return {
            "model": self.uri,
            "task": self.card.task.name,
            "architecture": self.card.model.name,
            **{key: tensor for key, tensor in tensors.items() if tensor["name"] in present},
            "preprocessing": {
                "interpolation": image.interpolation,
                "antialias": image.interpolation != "nearest",
                "divide_by": 255,
                "mean": image.mean,
                "std": image.std,
                **(self._describe_padding() if self.sees_whole else self._describe_crop()),
            },
            **graph.postprocessing(),
            "classes": self.card.classes,
        }

    def _describe_crop(self) -> dict[str, Any]:
        return {
            "resize_short_side_px": self.short_side,
            "center_crop_px": self.card.image.size,
        }

    def _describe_padding(self) -> dict[str, Any]:
        short, long = self.card.task.sides(self.card.image)
        steps: dict[str, Any] = {
            "resize_short_side_px": short,
            "unless_long_side_exceeds_px": long,
            "resize_rule": "factor = min(short / min(height, width), long / max(height, width)); "
            "each side becomes max(1, round(side * factor)), halves to even",
            "pad_to_multiples_of_px": CANVAS_DIVISOR,
        }
        smallest = self.graph().smallest_side
        if smallest > 1:
            steps["pad_to_at_least_px"] = smallest
        steps["pad_at"] = "bottom and right, after normalisation, with 0"
        return steps
