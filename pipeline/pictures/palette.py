"""Chooses a colour for each class, for pictures of label maps and objects.

    candidates on a grid ──repeatedly the one that is farthest from all chosen colours──▶ palette

Distances are Euclidean in Oklab (B. Ottosson, "A perceptual color space for image processing", 2020), where they
correspond to perceived differences.
"""

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

# The number of candidate values of red, green and blue each.
_STEPS = 16
# Darker colours would be taken for black.
_MIN_LIGHTNESS = 0.4

Colours = npt.NDArray[np.uint8]
"""RGB, [n, 3]."""

# From linear sRGB to the responses of the eye's cones, and from these to Oklab.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def palette(num_classes: int) -> Colours:
    """Returns [num_classes, 3] colours, neither black nor white. More classes add colours and change none."""
    return _order_colours()[:num_classes]


def colourise(labels: npt.NDArray[np.uint8], num_classes: int) -> Image.Image:
    """Returns the picture of a map of classes 0 … num_classes - 1, [height, width]; other values are black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = palette(num_classes)
    return Image.fromarray(colours[labels])


@functools.cache
def _order_colours() -> Colours:
    levels = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    grid = np.meshgrid(levels, levels, levels, indexing="ij")
    candidates = np.stack(grid, -1).reshape(-1, 3)
    oklab = _to_oklab(candidates)
    is_bright = oklab[:, 0] > _MIN_LIGHTNESS
    candidates = candidates[is_bright]
    oklab = oklab[is_bright]
    # Black is what has no class, and white the sheet: no class has a colour near them.
    black_and_white = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    to_each = np.linalg.norm(oklab[:, None] - _to_oklab(black_and_white), axis=-1)
    # The distance of each candidate to the nearest colour that is chosen.
    distance = to_each.min(1)
    chosen: list[int] = []
    for _ in range(256):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        to_farthest = np.linalg.norm(oklab - oklab[farthest], axis=-1)
        distance = np.minimum(distance, to_farthest)
    return candidates[chosen]


def _to_oklab(colours: Colours) -> npt.NDArray[np.float64]:
    """Returns lightness and two axes of hue, [n, 3], of sRGB colours, [n, 3]."""
    values = colours / 255
    # The transfer function of sRGB, IEC 61966-2-1.
    bright = ((values + 0.055) / 1.055) ** 2.4
    dark = values / 12.92
    linear = np.where(values > 0.04045, bright, dark)
    cones = linear @ _TO_CONES.T
    return np.cbrt(cones) @ _TO_OKLAB.T
