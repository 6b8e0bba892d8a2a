"""The base of detectors: their targets, their detections, and the anchors of those that have any.

    canvases [N, 3, H, W] ─ backbone ─▶ maps ─ the detector's heads ─┬─ with targets: losses, name -> [N]
    extents, N times (h, w)                                          └─ without: Detections, N of them

Images differ in size. An image fills the top left (h, w) pixels of its canvas, its extent; the rest is 0. Boxes are
x1, y1, x2, y2 in pixels of the canvas.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from pvt.dense import DenseNetwork

__all__ = ["Anchors", "Detections", "Detector", "Extent", "Objects"]

Extent = tuple[int, int]
"""Height and width in pixels."""

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""


@dataclass(frozen=True)
class Objects:
    """The annotated objects of an image: n boxes, each with its class."""

    boxes: Tensor
    """[n, 4] float32, each wider and higher than 0."""
    labels: Tensor
    """[n] int64, classes from 0."""
    masks: Tensor | None = None
    """[n, h, w] uint8 of 0 and 1, on the image's extent."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Objects":
        """Returns the objects on a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Objects(self.boxes.to(device), self.labels.to(device), masks)


@dataclass(frozen=True)
class Detections:
    """The detections in an image, those with the highest scores first."""

    boxes: Tensor
    """[n, 4] float32, inside the image's extent."""
    scores: Tensor
    """[n] float32 in 0 to 1, descending."""
    labels: Tensor
    """[n] int64, classes from 0."""
    masks: Tensor | None = None
    """[n, M, M] float32: probability that a position belongs to the object, on a grid of M x M over its box."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Detections":
        """Returns the detections at the chosen indices, in their order."""
        masks = None if self.masks is None else self.masks[chosen]
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen], masks)


class Detector(DenseNetwork, ABC):
    """A network that detects objects. Boxes, losses and matching are float32 under autocast, too."""

    has_masks = False
    """Whether the network is trained on masks and predicts them."""

    def forward(
        self,
        images: Tensor,
        extents: Sequence[Extent],
        targets: Sequence[Objects] | None = None,
        drop_path: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Returns each image's detections; with targets, in training mode, the losses by name, [N] float32 each.

        An image's losses are those of a batch of this image alone, on the same canvas, so that the caller may weight
        them. They are finite and involve every parameter, whether or not there are objects. Heads that sample draw from
        torch's default generator. `drop_path`: see DenseNetwork.maps.
        """
        assert len(images) == len(extents)
        maps = self.maps(images, drop_path)
        if targets is None:
            return self.detect(maps, extents)
        assert len(images) == len(targets)
        losses = self.losses(maps, extents, targets)
        stacked: dict[str, Tensor] = {}
        for name in losses[0]:
            stacked[name] = torch.stack([of_image[name] for of_image in losses])
        return stacked

    @abstractmethod
    def losses(
        self, maps: list[Tensor], extents: Sequence[Extent], targets: Sequence[Objects]
    ) -> list[dict[str, Tensor]]:
        """Returns each image's losses by name, float32 scalars, from the backbone's maps."""

    @abstractmethod
    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        """Returns each image's detections, from the backbone's maps."""


class Anchors(AnchorGenerator):
    """Boxes of 3 ratios, and of each size in `scales`, around every position of maps with the given strides.

    On the first map they have a side of `smallest` pixels times `scales`, on each further map twice as much.

    torchvision's own generator divides the canvas by a map's size to get the stride. That is wrong where the map's size
    was rounded up: a canvas of 800 px has 13 positions at stride 64, and not at 800 // 13 = 61.
    """

    def __init__(
        self,
        strides: Sequence[int],
        smallest: int,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        sides = [smallest * 2**level for level in range(len(strides))]
        sizes = tuple(tuple(side * scale for scale in scales) for side in sides)
        ratios = (RATIOS,) * len(strides)
        super().__init__(sizes, ratios)  # pyright: ignore[reportArgumentType] - floats will do
        self.strides = tuple(strides)

    def on(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Returns the anchors of each map, [h * w * 3 * len(scales), 4]: float32, whatever the maps are."""
        # torchvision's cell anchors have the type of the maps, which autocast may make bf16.
        self.set_cell_anchors(torch.float32, levels[0].device)
        grids = [list(level.shape[-2:]) for level in levels]
        steps = [[stride, stride] for stride in self.strides]
        return self.grid_anchors(grids, steps)  # pyright: ignore[reportArgumentType] - integers will do

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Returns the anchors of all maps for each image, as torchvision's networks request them."""
        anchors = torch.cat(self.on(feature_maps))
        return [anchors] * len(image_list.image_sizes)
