"""The model to export: its network with the registered weights, and how images become its input."""

from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from pipeline import config
from pipeline.errors import InputError
from pipeline.track import network
from pipeline.track.registry import Version
from pipeline.track.segmenter import CANVAS_DIVISOR, pixels, shown
from pvt import PyramidVisionTransformer
from pvt.semantic_fpn import SemanticFpn

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
        return network.load(self.card, self.weights)

    @property
    def is_dense(self) -> bool:
        """Whether each pixel gets a class, and not each image."""
        return isinstance(self.card.task, config.SemanticFpn)

    def require_classifier(self, to: str) -> None:
        """Raises InputError for another task's model, which the format has no place for."""
        if self.is_dense:
            raise InputError(
                f"--to {to}: has no place for {self.card.task.name}, which {self.uri} is: export it to onnx, "
                "torch-export or safetensors"
            )

    @property
    def size_divisor(self) -> int | None:
        """The network takes heights and widths that are multiples of this, in pixels; None: it takes one size alone."""
        if isinstance(self.network, PyramidVisionTransformer | SemanticFpn):
            return self.network.size_divisor
        return None

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
        """An RGB image as evaluation gives it to the network: [3, size, size], by default in the size of training; or
        whole, [3, H, W]."""
        if self.is_dense:
            return pixels(self.card, shown(self.card, image))
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
        before, after = self._whole_image() if self.is_dense else self._central_crop()
        return {
            "model": self.uri,
            "task": self.card.task.name,
            "architecture": self.card.model.name,
            "input": {"name": INPUT, "layout": "NCHW", "channels": "RGB", "dtype": "float32", "varying": varying},
            "output": {"name": OUTPUT, "layout": "NCHW" if self.is_dense else "NC", "dtype": "float32"},
            "preprocessing": {
                "interpolation": image.interpolation,
                "antialias": image.interpolation != "nearest",
                "divide_by": 255,
                "mean": image.mean,
                "std": image.std,
                **before,
            },
            **after,
            "classes": self.card.classes,
        }

    def _central_crop(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"resize_short_side_px": self.short_side, "center_crop_px": self.card.image.size}, {}

    def _whole_image(self) -> tuple[dict[str, Any], dict[str, Any]]:
        assert isinstance(self.card.task, config.SemanticFpn)
        short, long = self.card.task.sides(self.card.image)
        before = {
            "resize_short_side_px": short,
            "unless_long_side_exceeds_px": long,
            "resize_rule": "factor = min(short / min(height, width), long / max(height, width)); "
            "each side becomes max(1, round(side * factor)), halves to even",
            "pad_to_multiples_of_px": CANVAS_DIVISOR,
            "pad_at": "bottom and right, after normalisation, with 0",
        }
        after = {
            "postprocessing": [
                "resize the logits to the padded size",
                "cut them to the resized image, upper left",
                "resize them to the size that the image had",
                "take the class with the greatest logit at each pixel",
            ],
            "postprocessing_resize": {"mode": "bilinear", "align_corners": False, "antialias": False},
        }
        return before, after
