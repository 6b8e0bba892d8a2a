"""Composes a scene: digits of all sizes on a crop of a photograph, with the mask of each digit's visible pixels.

    seed, split, number ──▶ placed strokes ──▶ hidden digits removed ──painted, the lowest first──▶ Scene

Every fifth scan and a part of each photograph are kept for validation, so no stroke and no background is in both
splits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from pipeline.scenes.photographs import PHOTOGRAPHS, Photograph, Split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ALL_DIGITS = range(10)

SCENE_PX = 160, 320
"""The smallest and the largest side of a scene."""
MAX_DIGITS = 8
MIN_VISIBLE = 0.2
"""The share of a digit's stroke that has to be visible. A digit that shows less is removed from the scene."""
MIN_AREA_PX = 16

# The shares of scenes without a digit, and with a crowd.
_EMPTY = 0.05
_CROWDED = 0.15
# The sides of scans, for COCO's small, medium and large objects, and the share of each.
_SIDES_PX = (16, 52), (64, 150), (190, 240)
_SIZE_SHARES = 0.4, 0.4, 0.2
# The number of positions that are tried for a digit, which takes the one where it covers least.
_TRIES = 3
_CROWD_SIDE_PX = 10, 15
_CROWD_SPARE_PX = 8
# How dark a scan is where a stroke begins. A lower value would close the holes of small eights.
_INK = 0.55
_TURN_DEGREES = 15.0
# The difference in luminance, in 0 … 255, between a stroke and what is behind it.
_CONTRAST = 90.0
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

Opacity = npt.NDArray[np.float32]
"""[h, w] in 0 … 1."""
Mask = npt.NDArray[np.bool_]
"""[height, width]."""
Pixels = npt.NDArray[np.uint8]
Generator = np.random.Generator


class Stroke(NamedTuple):
    """A digit at its position in a scene, before anything covers it."""

    opacity: Opacity
    top: int
    left: int
    digit: int
    group: int
    """0 for a single digit. Strokes with the same other number are one crowd."""

    @property
    def mask(self) -> Mask:
        return self.opacity > 0.5

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.opacity.shape
        rows = slice(self.top, self.top + height)
        columns = slice(self.left, self.left + width)
        return rows, columns


@dataclasses.dataclass(frozen=True)
class Instance:
    digit: int
    mask: Mask
    """The instance's visible pixels, [height, width] of the scene."""
    is_crowd: bool
    """Whether the instance is a group of digits that are too small and close together to be distinguished."""


@dataclasses.dataclass(frozen=True)
class Scene:
    photograph: Photograph
    image: Pixels
    """RGB, [height, width, 3]."""
    classes: Pixels
    """The label map, [height, width]: 0 no label, on the rim of strokes; 1 background; from 2 on the digits."""
    instances: list[Instance]


def compose(
    seed: int,
    split: Split,
    number: int,
    side_px: tuple[int, int] = SCENE_PX,
    digits: range = ALL_DIGITS,
) -> Scene:
    """Returns scene `number` of a split, which does not depend on the number of scenes."""
    # The order of all draws from the generator is part of the data set: any change makes other scenes.
    rng = np.random.default_rng([seed, ("train", "val").index(split), number])
    height, width = rng.integers(*side_px, 2, endpoint=True).tolist()
    photograph = PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]
    background = _crop_background(rng, photograph.pixels(split), height, width)
    image = background.astype(np.float32)
    classes = np.ones((height, width), np.uint8)
    owner = np.zeros((height, width), np.int32)
    strokes = _place_strokes(
        rng,
        split,
        height,
        width,
        digits,
    )
    strokes = _drop_hidden(strokes, (height, width))
    for index, stroke in enumerate(strokes, 1):
        _paint(rng, image[stroke.window], stroke)
        stroke_image = Image.fromarray(stroke.mask).convert("L")
        rim = np.asarray(stroke_image.filter(ImageFilter.MaxFilter(3))) > 0
        # Writing to a view of the window writes to the scene.
        window = classes[stroke.window]
        window[rim] = 0
        window[stroke.mask] = 2 + stroke.digit - digits.start
        owner[stroke.window][stroke.mask] = index
    return Scene(
        photograph,
        image.round().astype(np.uint8),
        classes,
        _list_instances(strokes, owner),
    )


def _crop_background(
    rng: Generator,
    photograph: Pixels,
    height: int,
    width: int,
) -> Pixels:
    """Returns a random crop of a photograph, mirrored half of the time and resized to [height, width, 3]."""
    full_height, full_width = photograph.shape[:2]
    zoom = min(rng.uniform(0.8, 1.5), full_height / height, full_width / width)
    crop_height = int(height * zoom)
    crop_width = int(width * zoom)
    top = rng.integers(full_height - crop_height + 1)
    left = rng.integers(full_width - crop_width + 1)
    crop = photograph[top : top + crop_height, left : left + crop_width]
    if rng.integers(2):
        crop = crop[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(crop))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _place_strokes(
    rng: Generator,
    split: Split,
    height: int,
    width: int,
    digits: range,
) -> list[Stroke]:
    """Returns the strokes of a scene, the lowest first."""
    kind = rng.random()
    if kind < _EMPTY:
        return []
    strokes = []
    if kind > 1 - _CROWDED:
        strokes += _place_crowd(
            rng,
            split,
            height,
            width,
            digits,
        )
    longest = min(height, width) - 4
    covered = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, MAX_DIGITS, endpoint=True)):
        smallest, largest = _SIDES_PX[rng.choice(3, p=_SIZE_SHARES)]
        # Uniform on a logarithmic scale: small digits are as frequent as large ones.
        exponent = rng.uniform(np.log(smallest), np.log(largest))
        side = round(np.exp(exponent))
        opacity, digit = _draw_stroke(rng, split, min(side, longest), digits)
        # A turned scan may be larger than the scene.
        opacity = opacity[:height, :width]
        stroke_height, stroke_width = opacity.shape
        spare = height - stroke_height + 1, width - stroke_width + 1
        candidates = []
        for top, left in rng.integers(spare, size=(_TRIES, 2)).tolist():
            stroke = Stroke(
                opacity,
                top,
                left,
                digit,
                group=0,
            )
            num_covered = int(covered[stroke.window][stroke.mask].sum())
            candidates.append((num_covered, stroke))
        _, best = min(candidates, key=lambda candidate: candidate[0])
        covered[best.window] |= best.mask
        strokes.append(best)
    return strokes


def _place_crowd(
    rng: Generator,
    split: Split,
    height: int,
    width: int,
    digits: range,
) -> list[Stroke]:
    """Returns tiny strokes of one digit, side by side in rows."""
    digit = int(rng.integers(digits.start, digits.stop))
    _, pitch = _CROWD_SIDE_PX
    rows = int(rng.integers(2, 5))
    columns = int(rng.integers(3, 8))
    top = int(rng.integers(height - rows * pitch - _CROWD_SPARE_PX))
    left = int(rng.integers(width - columns * pitch - _CROWD_SPARE_PX))
    strokes = []
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        side = int(rng.integers(*_CROWD_SIDE_PX))
        opacity, _ = _draw_stroke(
            rng,
            split,
            side,
            range(digit, digit + 1),
            turn_degrees=0.0,
        )
        stroke = Stroke(
            opacity,
            top + row * pitch,
            left + column * pitch,
            digit,
            group=1,
        )
        strokes.append(stroke)
    return strokes


def _draw_stroke(
    rng: Generator,
    split: Split,
    side: int,
    digits: range,
    turn_degrees: float = _TURN_DEGREES,
) -> tuple[Opacity, int]:
    """Returns a scan, resized to `side` pixels and turned, as opacity cropped to the stroke; and its digit."""
    pictures, labels = scans(split)
    is_wanted = (labels >= digits.start) & (labels < digits.stop)
    choices = np.flatnonzero(is_wanted)
    chosen = choices[rng.integers(len(choices))]
    # The scans have 8 × 8 pixels, and 10 × 10 with an empty border.
    scan = Image.fromarray(np.pad(pictures[chosen], 1))
    padded_side = side * 10 // 8
    large = scan.resize((padded_side, padded_side), Image.Resampling.BICUBIC)
    degrees = rng.uniform(-1, 1) * turn_degrees
    turned = large.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    # The grey edge of a scan is one of the scan's pixels wide. In the scene it shall be two pixels wide.
    steepness = max(1.0, side / 16)
    opacity = ((np.asarray(turned) - _INK) * steepness + 0.5).clip(0, 1)
    rows = np.flatnonzero(opacity.any(1))
    columns = np.flatnonzero(opacity.any(0))
    # A border of one pixel is kept for the rim.
    top = max(rows[0] - 1, 0)
    left = max(columns[0] - 1, 0)
    crop = opacity[top : rows[-1] + 2, left : columns[-1] + 2]
    return crop, int(labels[chosen])


@functools.cache
def scans(split: Split) -> tuple[Opacity, npt.NDArray[np.int64]]:
    """Returns a split's scans of digits, [n, 8, 8] in 0 … 1, and the digits, [n]."""
    digits: Any = load_digits()
    is_val = np.arange(len(digits.target)) % 5 == 0
    chosen = is_val == (split == "val")
    # The scans have values of 0 to 16.
    opacity = (digits.images[chosen] / 16).astype(np.float32)
    return opacity, digits.target[chosen]


def _drop_hidden(strokes: list[Stroke], shape: tuple[int, int]) -> list[Stroke]:
    """Returns the strokes without those that others above them hide."""
    covered = np.zeros(shape, bool)
    visible = []
    # From the highest down, so that all that covers a stroke is known.
    for stroke in reversed(strokes):
        mask = stroke.mask
        seen = mask & ~covered[stroke.window]
        num_needed = max(MIN_VISIBLE * mask.sum(), MIN_AREA_PX)
        if seen.sum() >= num_needed:
            visible.append(stroke)
            covered[stroke.window] |= mask
    return visible[::-1]


def _paint(rng: Generator, behind: Opacity, stroke: Stroke) -> None:
    """Blends a colour, lighter or darker than what is behind the stroke, into the image's window."""
    luminance = float((behind[stroke.mask] @ _LUMINANCE).mean())
    if luminance > 127.5:
        low, high = 0.0, luminance - _CONTRAST
    else:
        low, high = luminance + _CONTRAST, 255.0
    tint = rng.uniform(-60, 60, 3)
    # The tint changes the hue alone: its luminance is taken off.
    color = (rng.uniform(low, high) + tint - tint @ _LUMINANCE).clip(0, 255)
    opacity = stroke.opacity[..., None]
    # In place: `behind` is a view of the image.
    behind += opacity * (color.astype(np.float32) - behind)


def _list_instances(strokes: list[Stroke], owner: npt.NDArray[np.int32]) -> list[Instance]:
    """Returns the objects of a scene. `owner`, [height, width], has the number of the visible stroke, from 1 on."""
    instances = []
    crowd = []
    for number, stroke in enumerate(strokes, 1):
        if stroke.group:
            crowd.append(number)
        else:
            instances.append(Instance(stroke.digit, owner == number, is_crowd=False))
    # A scene has one crowd at most.
    if crowd:
        first = strokes[crowd[0] - 1]
        instances.append(Instance(first.digit, np.isin(owner, crowd), is_crowd=True))
    return instances
