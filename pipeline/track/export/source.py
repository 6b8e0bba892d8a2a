"""The model to export: its network with the registered weights, and how images become its input."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.config import ClassificationConfig, MaskRcnnConfig
from pipeline.errors import InputError
from pipeline.track.export import graphs
from pipeline.track.export.graphs import BOXES, EXTENT, IMAGE, LOGITS, Graph
from pipeline.track.registry.registry import Version
from pipeline.track.serve import load_network, whole_images
from pipeline.track.serve.whole_images import CANVAS_DIVISOR
from pvt import PyramidVisionTransformer
from pvt.dense import DenseNetwork

PREPROCESSING = "preprocessing.json"
"""The file beside a graph that holds what `describe` says."""


class ExportSource:
    def __init__(self, version: Version) -> None:
        self.uri, self.folder, self.card = version.uri, version.folder, version.card
        self.card.require_head(self.uri)
        self.weights: Path = version.weights
        self.network = self.build()
        """In fp32, in evaluation mode. Not to be changed: exports are compared with it."""

    def build(self) -> nn.Module:
        """The same network again, to be changed."""
        return load_network.load_network(self.card, self.weights)

    def graph(self, network: nn.Module | None = None) -> Graph:
        """This network, or another one of its kind, as what is exported and compared."""
        return graphs.graph(self.card.task, network or self.network)

    @property
    def sees_whole(self) -> bool:
        """Whether it is shown whole images, and not their centres."""
        return not isinstance(self.card.task, ClassificationConfig)

    def require_classifier(self, to: str) -> None:
        """Raises InputError for another task's model, which the format has no place for."""
        if self.sees_whole:
            others = "" if isinstance(self.card.task, MaskRcnnConfig) else "onnx, torch-export or "
            raise InputError(
                f"--to {to}: has no place for {self.card.task.name}, which {self.uri} is: "
                f"export it to {others}safetensors"
            )

    def require_graph(self, to: str) -> None:
        """Raises InputError for a network whose operations depend on what it sees."""
        if isinstance(self.card.task, MaskRcnnConfig):
            raise InputError(
                f"--to {to}: {self.uri} is a mask_rcnn, whose second stage looks at as many regions as the first one "
                "has found, and a graph has operations of fixed shapes: serve it with mlflow (docs/serving.md), or "
                "export it to safetensors and build it with pvt.mask_rcnn"
            )

    @property
    def size_divisor(self) -> int | None:
        """The network takes heights and widths that are multiples of this, in pixels; None: it takes one size alone."""
        if isinstance(self.network, PyramidVisionTransformer | DenseNetwork):
            return self.network.size_divisor
        return None

    @property
    def varying(self) -> dict[str, str]:
        """The sizes of the network's input that may vary, each with what it may be."""
        if self.size_divisor is None:
            return {"batch": "any"}
        smallest = self.graph().smallest_side
        sides = f"multiples of {self.size_divisor}" + (f", at least {smallest}" if smallest > 1 else "")
        return {"batch": "any", "height": sides, "width": sides}

    @property
    def short_side(self) -> int:
        """To which evaluation resizes an image before it crops the centre, in pixels."""
        return int(self.card.image.size / self.card.image.crop_pct)

    def pixels(self, image: Image.Image, size: int | None = None) -> Tensor:
        """An RGB image as evaluation gives it to the network: [3, size, size], by default in the size of training; or
        whole, [3, H, W]."""
        if self.sees_whole:
            return whole_images.pixels(self.card, whole_images.shown(self.card, image))
        size = size or self.card.image.size
        transform: Any = create_transform(
            (3, size, size),
            interpolation=self.card.image.interpolation,
            mean=self.card.image.mean,
            std=self.card.image.std,
            crop_pct=self.card.image.crop_pct,
        )
        return transform(image)

    def inputs(self, images: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        """What the graph takes for these images: [N, 3, H, W], whole ones on a canvas that holds all, and for a
        detector also [N, 2], height and width of each."""
        inputs = [self.pixels(image) for image in images]
        smallest = self.graph().smallest_side if self.sees_whole else 0
        height, width = (max(smallest, *(each.shape[axis] for each in inputs)) for axis in (1, 2))
        batch = torch.stack([pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each in inputs])
        if EXTENT not in self.graph().inputs:
            return (batch,)
        return batch, torch.tensor([whole_images.fit(self.card, image.height, image.width) for image in images])

    def describe(self, varying: dict[str, str]) -> dict[str, Any]:
        """What a program needs to know that finds a graph and nothing else."""
        image, graph = self.card.image, self.graph()
        tensors = {
            "input": {"name": IMAGE, "layout": "NCHW", "channels": "RGB", "dtype": "float32", "varying": varying},
            "extent": {"name": EXTENT, "layout": "N2", "dtype": "int64", "holds": "height, width before padding"},
            "output": {"name": LOGITS, "layout": graph.outputs[LOGITS], "dtype": "float32"},
            "boxes": {"name": BOXES, "layout": "NA4", "dtype": "float32", "holds": "x1, y1, x2, y2 in padded pixels"},
        }
        return {
            "model": self.uri,
            "task": self.card.task.name,
            "architecture": self.card.model.name,
            **{key: about for key, about in tensors.items() if about["name"] in (*graph.inputs, *graph.outputs)},
            "preprocessing": {
                "interpolation": image.interpolation,
                "antialias": image.interpolation != "nearest",
                "divide_by": 255,
                "mean": image.mean,
                "std": image.std,
                **(self._whole_image() if self.sees_whole else self._central_crop()),
            },
            **graph.postprocessing(),
            "classes": self.card.classes,
        }

    def _central_crop(self) -> dict[str, Any]:
        return {"resize_short_side_px": self.short_side, "center_crop_px": self.card.image.size}

    def _whole_image(self) -> dict[str, Any]:
        assert not isinstance(self.card.task, ClassificationConfig)
        short, long = self.card.task.sides(self.card.image)
        return {
            "resize_short_side_px": short,
            "unless_long_side_exceeds_px": long,
            "resize_rule": "factor = min(short / min(height, width), long / max(height, width)); "
            "each side becomes max(1, round(side * factor)), halves to even",
            "pad_to_multiples_of_px": CANVAS_DIVISOR,
            **({"pad_to_at_least_px": smallest} if (smallest := self.graph().smallest_side) > 1 else {}),
            "pad_at": "bottom and right, after normalisation, with 0",
        }
