"""What detectors share: what they learn from, what they find, and the anchors of those that have any.

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

Extent = tuple[int, int]  # height, width in pixels
RATIOS = (0.5, 1.0, 2.0)  # an anchor's height to its width


@dataclass(frozen=True)
class Objects:
    """What is to be found in an image: n boxes, each with its class."""

    boxes: Tensor
    """[n, 4] float32, each wider and higher than 0."""
    labels: Tensor
    """[n] int64, classes from 0."""
    masks: Tensor | None = None
    """[n, h, w] uint8 of 0 and 1, on the image's extent."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Objects":
        masks = None if self.masks is None else self.masks.to(device)
        return Objects(self.boxes.to(device), self.labels.to(device), masks)


@dataclass(frozen=True)
class Detections:
    """What was found in an image, the best first."""

    boxes: Tensor
    """[n, 4] float32, inside the image's extent."""
    scores: Tensor
    """[n] float32 in 0 to 1, falling."""
    labels: Tensor
    """[n] int64, classes from 0."""
    masks: Tensor | None = None
    """[n, M, M] float32: probability that a place is the object's, on a grid of M x M places over its box."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Detections":
        """Those of the given positions, in their order."""
        masks = None if self.masks is None else self.masks[chosen]
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen], masks)


class Detector(DenseNetwork, ABC):
    """A network that finds objects. Boxes, losses and matching are float32 under autocast, too."""

    has_masks = False
    """Whether it learns and finds them."""

    def forward(
        self,
        images: Tensor,
        extents: Sequence[Extent],
        targets: Sequence[Objects] | None = None,
        drop_path: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """With targets, in training mode: the losses by name, [N] float32 each. Without: what is found in each image.

        An image's losses are those of a batch of this image alone, on the same canvas, so that the caller may weigh
        them. They are finite and involve every parameter, whether or not there are objects. What heads sample, they
        draw from torch's default generator. `drop_path`: see DenseNetwork.maps.
        """
        assert len(images) == len(extents)
        maps = self.maps(images, drop_path)
        if targets is None:
            return self.detect(maps, extents)
        assert len(images) == len(targets)
        losses = self.losses(maps, extents, targets)
        return {name: torch.stack([of_image[name] for of_image in losses]) for name in losses[0]}

    @abstractmethod
    def losses(
        self, maps: list[Tensor], extents: Sequence[Extent], targets: Sequence[Objects]
    ) -> list[dict[str, Tensor]]:
        """Each image's losses by name, float32 scalars, from the backbone's maps."""

    @abstractmethod
    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        """What is found in each image, from the backbone's maps."""


class Anchors(AnchorGenerator):
    """Boxes of 3 ratios, and of each size in `scales`, around every place of maps with the given strides.

    On the first map they have a side of `smallest` pixels times `scales`, on each further one twice as much. Other
    than torchvision's own, it is told the strides: divided from sizes they are wrong where a map's size was rounded
    up, as on a canvas of 800 px, which has 13 places at stride 64, and not at 800 // 13 = 61.
    """

    def __init__(self, strides: Sequence[int], smallest: int, scales: Sequence[float] = (1.0,)) -> None:
        sizes = tuple(tuple(smallest * 2**level * scale for scale in scales) for level in range(len(strides)))
        super().__init__(sizes, (RATIOS,) * len(strides))  # pyright: ignore[reportArgumentType] - floats will do
        self.strides = tuple(strides)

    def on(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Anchors of each map, [h * w * 3 * len(scales), 4]: float32, whatever the maps are."""
        self.set_cell_anchors(torch.float32, levels[0].device)
        grids = [list(level.shape[-2:]) for level in levels]
        steps = [[stride, stride] for stride in self.strides]
        return self.grid_anchors(grids, steps)  # pyright: ignore[reportArgumentType] - integers will do

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """As torchvision's networks ask for them: those of all maps, for each image."""
        return [torch.cat(self.on(feature_maps))] * len(image_list.image_sizes)
