"""A colour for each class, for pictures of label maps.

    candidates on a grid ──one after the other, the farthest from all that are taken──▶ palette

Distances are Euclidean in Oklab (B. Ottosson, "A perceptual color space for image processing", 2020), where they are
about as large as they look.
"""

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

_STEPS = 16  # of the grid, in each of red, green and blue
_MIN_LIGHTNESS = 0.4  # of a colour that is not taken for black

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


def palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """RGB, [num_classes, 3], neither black nor white. More classes add colours and change none."""
    return _ordered()[:num_classes]


def colourise(labels: npt.NDArray[np.uint8], num_classes: int) -> Image.Image:
    """The picture of classes 0 … num_classes - 1, [height, width]; what is of no class is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = palette(num_classes)
    return Image.fromarray(colours[labels])


@functools.cache
def _ordered() -> npt.NDArray[np.uint8]:
    levels = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(candidates)
    bright = places[:, 0] > _MIN_LIGHTNESS
    candidates, places = candidates[bright], places[bright]
    taken = _oklab(np.array([[0, 0, 0], [255, 255, 255]], np.uint8))
    distance = np.linalg.norm(places[:, None] - taken, axis=-1).min(1)
    chosen: list[int] = []
    for _ in range(256):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=-1))
    return candidates[chosen]


def _oklab(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Lightness and two axes of hue, [n, 3], of sRGB colours, [n, 3]."""
    values = colours / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T
