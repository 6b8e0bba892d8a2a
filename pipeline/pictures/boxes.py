"""Objects drawn on their image: a tint where a mask is, a frame, and a label on it.

image, boxes, labels ─[scaled]─▶ masks ─▶ frames ─▶ labels ─▶ picture, of each the first object on top
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.palette import palette

_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_TEXT_PX, _PAD_PX = 11, 2
_TINT = 0.45  # opacity of a mask
_MIDDLE_GREY = 140  # colours that are brighter have black letters on them


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float] | None,
    masks: Iterable[npt.NDArray[np.uint8]] | None,
    classes: Sequence[str],
    *,
    side_px: int | None = None,
) -> Image.Image:
    """An RGB image with its objects, the most important ones first in each list.

    `boxes`: x, y, width, height in pixels of the image; `labels`: positions in `classes`; `scores` in 0 to 1; `masks`:
    [height, width] of 0 and 1, of the image's size. `side_px`: make the image's long side so long before anything is
    drawn, so that lines and letters keep their size.
    """
    factor = side_px / max(image.size) if side_px else 1.0
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    colours = [_colour(label, len(classes)) for label in labels]
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    if masks is not None:
        picture = _tinted(picture, masks, colours)
    draw = ImageDraw.Draw(picture)
    frames = [_frame(box, factor) for box in boxes]
    for frame, colour in reversed(list(zip(frames, colours, strict=True))):
        draw.rectangle(_grown(frame, 1), outline="black", width=4)  # to be seen on any ground
        draw.rectangle(frame, outline=colour, width=2)
    texts = [classes[label] for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    for frame, colour, text in reversed(list(zip(frames, colours, texts, strict=True))):
        _write(draw, picture.size, frame, colour, text)
    return picture


def _tinted(
    picture: Image.Image, masks: Iterable[npt.NDArray[np.uint8]], colours: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """Each pixel in the colour of the first object that has it."""
    pixels = np.array(picture)
    is_free = np.ones(pixels.shape[:2], np.bool_)
    for mask, colour in zip(masks, colours, strict=True):
        here = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)) > 0
        own = here & is_free
        pixels[own] = ((1 - _TINT) * pixels[own] + _TINT * np.array(colour)).round()
        is_free &= ~here
    return Image.fromarray(pixels)


def _write(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    frame: tuple[float, float, float, float],
    colour: tuple[int, int, int],
    text: str,
) -> None:
    """A label above a frame; where the picture ends, inside of it, or below one that it would hide."""
    width, height = _font().getlength(text) + 2 * _PAD_PX, _TEXT_PX + 2 * _PAD_PX
    left = max(0.0, min(frame[0] - 1, size[0] - width))
    inside_or_below = frame[1] if frame[3] - frame[1] > 2 * height else frame[3]
    top = frame[1] - height if frame[1] >= height else inside_or_below
    draw.rectangle((left, top, left + width, top + height), colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = "black" if brightness > _MIDDLE_GREY else "white"
    draw.text((left + _PAD_PX, top + height / 2), text, ink, _font(), anchor="lm")


def _frame(box: Sequence[float], factor: float) -> tuple[float, float, float, float]:
    x, y, width, height = (value * factor for value in box)
    return x, y, x + max(width, 1), y + max(height, 1)


def _grown(frame: tuple[float, float, float, float], by: float) -> tuple[float, float, float, float]:
    return frame[0] - by, frame[1] - by, frame[2] + by, frame[3] + by


def _colour(label: int, num_classes: int) -> tuple[int, int, int]:
    red, green, blue = palette(num_classes)[label].tolist()
    return red, green, blue


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, _TEXT_PX)
