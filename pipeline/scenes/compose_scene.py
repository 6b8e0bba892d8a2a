"""One scene: digits of all sizes on a piece of a photograph, with the pixels that each of them shows.

    seed, split, number ──▶ what lies where ──▶ hidden digits removed ──painted, the lowest first──▶ Scene

Every fifth scan is kept for validation, as is a part of each photograph, so no stroke and no background is in both
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
"""Least and most of a scene's sides."""
MAX_DIGITS = 8
MIN_VISIBLE = 0.2
"""Of a digit's stroke. What would show less is left out of the scene."""
MIN_AREA_PX = 16

_EMPTY, _CROWDED = 0.05, 0.15  # shares of scenes without a digit, and with a crowd
_SIDES_PX = (16, 52), (64, 150), (190, 240)  # of scans, for COCO's small, medium and large objects
_SIZE_SHARES = 0.4, 0.4, 0.2
_TRIES = 3  # places for a digit, of which it takes the one where it covers least
_CROWD_SIDE_PX, _CROWD_SPARE_PX = (10, 15), 8
_INK = 0.55  # how dark a scan is where a stroke begins; less would close the holes of small eights
_TURN_DEGREES = 15.0
_CONTRAST = 90.0  # of luminance, in 0 … 255, between a stroke and what is behind it


class Stroke(NamedTuple):
    """A digit as it lies in a scene, before anything covers it."""

    opacity: npt.NDArray[np.float32]
    """[h, w] in 0 … 1."""
    top: int
    left: int
    digit: int
    group: int
    """Strokes of one number, which is not 0, are a crowd."""

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        return self.opacity > 0.5

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.opacity.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


@dataclasses.dataclass(frozen=True)
class Instance:
    digit: int
    mask: npt.NDArray[np.bool_]
    """[height, width] of the scene: the pixels that are seen of it."""
    is_crowd: bool
    """Several digits, too small and close to be told apart."""


@dataclasses.dataclass(frozen=True)
class Scene:
    photograph: Photograph
    image: npt.NDArray[np.uint8]
    """RGB, [height, width, 3]."""
    classes: npt.NDArray[np.uint8]
    """[height, width]: 0 on the rim of strokes, which belongs to nobody; 1 background; from 2 on the digits."""
    instances: list[Instance]


def compose(
    seed: int, split: Split, number: int, side_px: tuple[int, int] = SCENE_PX, digits: range = ALL_DIGITS
) -> Scene:
    """Scene `number` of a split, which does not depend on how many there are."""
    rng = np.random.default_rng([seed, ("train", "val").index(split), number])
    height, width = (int(side) for side in rng.integers(*side_px, 2, endpoint=True))
    photograph = PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]
    image = _background(rng, photograph.pixels(split), height, width).astype(np.float32)
    classes = np.ones((height, width), np.uint8)
    owner = np.zeros((height, width), np.int32)
    strokes = _visible(_place(rng, split, height, width, digits), (height, width))
    for number, stroke in enumerate(strokes, 1):
        _paint(rng, image[stroke.window], stroke)
        rim = np.asarray(Image.fromarray(stroke.mask).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
        classes[stroke.window][rim] = 0
        classes[stroke.window][stroke.mask] = 2 + stroke.digit - digits.start
        owner[stroke.window][stroke.mask] = number
    return Scene(photograph, image.round().astype(np.uint8), classes, _instances(strokes, owner))


def _background(
    rng: np.random.Generator, photograph: npt.NDArray[np.uint8], height: int, width: int
) -> npt.NDArray[np.uint8]:
    """A piece of a photograph, perhaps mirrored, made [height, width, 3]."""
    full_height, full_width = photograph.shape[:2]
    zoom = min(rng.uniform(0.8, 1.5), full_height / height, full_width / width)
    cut_height, cut_width = int(height * zoom), int(width * zoom)
    top, left = rng.integers(full_height - cut_height + 1), rng.integers(full_width - cut_width + 1)
    cut = photograph[top : top + cut_height, left : left + cut_width]
    if rng.integers(2):
        cut = cut[:, ::-1]
    return np.asarray(Image.fromarray(np.ascontiguousarray(cut)).resize((width, height), Image.Resampling.BICUBIC))


def _place(rng: np.random.Generator, split: Split, height: int, width: int, digits: range) -> list[Stroke]:
    """The lowest first."""
    strokes = []
    kind = rng.random()
    if kind < _EMPTY:
        return []
    if kind > 1 - _CROWDED:
        strokes += _crowd(rng, split, height, width, digits)
    room = min(height, width) - 4
    taken = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, MAX_DIGITS, endpoint=True)):
        low, high = _SIDES_PX[rng.choice(3, p=_SIZE_SHARES)]
        side = min(round(np.exp(rng.uniform(np.log(low), np.log(high)))), room)
        opacity, digit = _stroke(rng, split, side, digits)
        opacity = opacity[:height, :width]  # a turned scan may be larger
        spare = height - opacity.shape[0] + 1, width - opacity.shape[1] + 1
        corners = rng.integers(spare, size=(_TRIES, 2)).tolist()
        tried = [Stroke(opacity, top, left, digit, group=0) for top, left in corners]
        stroke = min(tried, key=lambda stroke: int(taken[stroke.window][stroke.mask].sum()))
        taken[stroke.window] |= stroke.mask
        strokes.append(stroke)
    return strokes


def _crowd(rng: np.random.Generator, split: Split, height: int, width: int, digits: range) -> list[Stroke]:
    """Tiny digits of one kind, side by side in rows."""
    digit = int(rng.integers(digits.start, digits.stop))
    pitch = _CROWD_SIDE_PX[1]
    rows, columns = int(rng.integers(2, 5)), int(rng.integers(3, 8))
    top = int(rng.integers(height - rows * pitch - _CROWD_SPARE_PX))
    left = int(rng.integers(width - columns * pitch - _CROWD_SPARE_PX))
    strokes = []
    for cell in range(rows * columns):
        opacity, _ = _stroke(rng, split, int(rng.integers(*_CROWD_SIDE_PX)), range(digit, digit + 1), turn_degrees=0.0)
        y, x = top + cell // columns * pitch, left + cell % columns * pitch
        strokes.append(Stroke(opacity, y, x, digit, group=1))
    return strokes


def _stroke(
    rng: np.random.Generator, split: Split, side: int, digits: range, turn_degrees: float = _TURN_DEGREES
) -> tuple[npt.NDArray[np.float32], int]:
    """A scan made `side` pixels large and turned, as opacity cut to the stroke; and which digit it is."""
    pictures, labels = scans(split)
    choices = np.flatnonzero((labels >= digits.start) & (labels < digits.stop))
    chosen = choices[rng.integers(len(choices))]
    scan = Image.fromarray(np.pad(pictures[chosen], 1))
    large = scan.resize((side * 10 // 8, side * 10 // 8), Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-1, 1) * turn_degrees, Image.Resampling.BICUBIC, expand=True)
    # A scan's grey edge is one of its own pixels wide: of the scene's, it shall be two.
    opacity = ((np.asarray(turned) - _INK) * max(1.0, side / 16) + 0.5).clip(0, 1)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    # One pixel around it is left, for its rim.
    cut = opacity[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
    return cut, int(labels[chosen])


@functools.cache
def scans(split: Split) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A split's digits, [n, 8, 8] in 0 … 1, and which they are, [n]."""
    digits: Any = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "val")
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen]


def _visible(strokes: list[Stroke], shape: tuple[int, int]) -> list[Stroke]:
    """Without those that the ones above them hide."""
    covered = np.zeros(shape, bool)
    kept = []
    for stroke in reversed(strokes):
        seen = stroke.mask & ~covered[stroke.window]
        if seen.sum() >= max(MIN_VISIBLE * stroke.mask.sum(), MIN_AREA_PX):
            kept.append(stroke)
            covered[stroke.window] |= stroke.mask
    return kept[::-1]


def _paint(rng: np.random.Generator, behind: npt.NDArray[np.float32], stroke: Stroke) -> None:
    """Blend a colour, lighter or darker than what is behind the stroke, into the image's window."""
    luminance = float((behind[stroke.mask] @ _LUMINANCE).mean())
    low, high = (0.0, luminance - _CONTRAST) if luminance > 127.5 else (luminance + _CONTRAST, 255.0)
    tint = rng.uniform(-60, 60, 3)
    color = (rng.uniform(low, high) + tint - tint @ _LUMINANCE).clip(0, 255)
    behind += stroke.opacity[..., None] * (color.astype(np.float32) - behind)


_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def _instances(strokes: list[Stroke], owner: npt.NDArray[np.int32]) -> list[Instance]:
    """`owner` [height, width] holds at each pixel the number of the stroke that is seen, from 1 on."""
    instances = [
        Instance(stroke.digit, owner == number, is_crowd=False)
        for number, stroke in enumerate(strokes, 1)
        if not stroke.group
    ]
    crowd = [number for number, stroke in enumerate(strokes, 1) if stroke.group]
    if crowd:
        instances.append(Instance(strokes[crowd[0] - 1].digit, np.isin(owner, crowd), is_crowd=True))
    return instances
