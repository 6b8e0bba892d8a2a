"""The model to export: its network with the registered weights, and how images become its input."""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from pipeline.track.registry import Version
from pvt import PyramidVisionTransformer

INPUT, OUTPUT = "image", "logits"
"""Names in graphs."""
PREPROCESSING = "preprocessing.json"
"""The file beside a graph that holds what `describe` says."""


class Source:
    def __init__(self, version: Version) -> None:
        self.uri, self.folder, self.card = version.uri, version.folder, version.card
        self.weights: Path = version.weights
        self.network = self.build()
        """In fp32, in evaluation mode. Not to be changed: exports are compared with it."""

    def build(self) -> nn.Module:
        """The same network again, to be changed."""
        network = timm.create_model(self.card.model.name, **self.arguments).eval().requires_grad_(False)
        network.load_state_dict(safetensors.torch.load_file(self.weights))
        return network

    @property
    def arguments(self) -> dict[str, Any]:
        """Of timm.create_model, beside the name."""
        return {"num_classes": len(self.card.classes), "img_size": self.card.image.size}

    @property
    def size_divisor(self) -> int | None:
        """The network takes heights and widths that are multiples of this, in pixels; None: it takes one size alone."""
        return self.network.size_divisor if isinstance(self.network, PyramidVisionTransformer) else None

    @property
    def varying(self) -> dict[str, str]:
        """The sizes of the network's input that may vary, each with what it may be."""
        if self.size_divisor is None:
            return {"batch": "any"}
        return {"batch": "any", **dict.fromkeys(("height", "width"), f"multiples of {self.size_divisor}")}

    @property
    def short_side(self) -> int:
        """To which evaluation resizes an image before it crops the centre, in pixels."""
        return int(self.card.image.size / self.card.image.crop_pct)

    def pixels(self, image: Image.Image, size: int | None = None) -> Tensor:
        """An RGB image as evaluation gives it to the network, [3, size, size]; by default in the size of training."""
        size = size or self.card.image.size
        transform: Any = create_transform(
            (3, size, size),
            interpolation=self.card.image.interpolation,
            mean=self.card.image.mean,
            std=self.card.image.std,
            crop_pct=self.card.image.crop_pct,
        )
        return transform(image)

    def describe(self, varying: dict[str, str]) -> dict[str, Any]:
        """What a program needs to know that finds a graph and nothing else."""
        image = self.card.image
        return {
            "model": self.uri,
            "architecture": self.card.model.name,
            "input": {"name": INPUT, "layout": "NCHW", "channels": "RGB", "dtype": "float32", "varying": varying},
            "output": {"name": OUTPUT, "layout": "NC", "dtype": "float32"},
            "preprocessing": {
                "resize_short_side_px": self.short_side,
                "interpolation": image.interpolation,
                "antialias": image.interpolation != "nearest",
                "center_crop_px": image.size,
                "divide_by": 255,
                "mean": image.mean,
                "std": image.std,
            },
            "classes": self.card.classes,
        }
