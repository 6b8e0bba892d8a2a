"""Draws objects on their image: a tint where a mask is, a frame, and a label on the frame.

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
_TEXT_PX = 11
_PAD_PX = 2
# The opacity of a mask.
_TINT = 0.45
# Colours that are brighter have black letters on them.
_MIDDLE_GREY = 140

Colour = tuple[int, int, int]
Mask = npt.NDArray[np.uint8]
Frame = tuple[float, float, float, float]
"""The left, top, right and bottom of a rectangle."""


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float] | None,
    masks: Iterable[Mask] | None,
    classes: Sequence[str],
    *,
    side_px: int | None = None,
) -> Image.Image:
    """Returns an RGB image with its objects, the most important ones first in each list.

    `boxes`: x, y, width, height in pixels of the image; `labels`: positions in `classes`; `scores` in 0 to 1; `masks`:
    [height, width] of 0 and 1, of the image's size. `side_px`: the length that the image's longer side is scaled to
    before anything is drawn, so that lines and letters keep their size.
    """
    factor = side_px / max(image.size) if side_px else 1.0
    size = (
        max(1, round(image.width * factor)),
        max(1, round(image.height * factor)),
    )
    colours = [_choose_colour(label, len(classes)) for label in labels]
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    if masks is not None:
        picture = _tint(picture, masks, colours)
    draw = ImageDraw.Draw(picture)
    frames = [_scale_frame(box, factor) for box in boxes]
    # In reverse, so that the most important objects are on top; the labels are on top of all frames.
    framed = list(zip(frames, colours, strict=True))
    for frame, colour in reversed(framed):
        left, top, right, bottom = frame
        # The black border makes the frame visible on any background.
        draw.rectangle(
            (left - 1, top - 1, right + 1, bottom + 1),
            outline="black",
            width=4,
        )
        draw.rectangle(frame, outline=colour, width=2)
    texts = [classes[label] for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    labelled = list(zip(frames, colours, texts, strict=True))
    for frame, colour, text in reversed(labelled):
        _draw_label(
            draw,
            picture.size,
            frame,
            colour,
            text,
        )
    return picture


def _tint(
    picture: Image.Image,
    masks: Iterable[Mask],
    colours: Sequence[Colour],
) -> Image.Image:
    """Returns the picture with each pixel tinted in the colour of the first object that covers it."""
    pixels = np.array(picture)
    is_free = np.ones(pixels.shape[:2], np.bool_)
    for mask, colour in zip(masks, colours, strict=True):
        resized = Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)
        is_covered = np.asarray(resized) > 0
        chosen = is_covered & is_free
        mixed = (1 - _TINT) * pixels[chosen] + _TINT * np.array(colour)
        pixels[chosen] = mixed.round()
        is_free &= ~is_covered
    return Image.fromarray(pixels)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    frame: Frame,
    colour: Colour,
    text: str,
) -> None:
    """Draws a label above a frame; at the picture's edge inside the frame, or below a frame that it would hide."""
    frame_left, frame_top, _, frame_bottom = frame
    width = _font().getlength(text) + 2 * _PAD_PX
    height = _TEXT_PX + 2 * _PAD_PX
    picture_width, _ = size
    left = max(0.0, min(frame_left - 1, picture_width - width))
    if frame_top >= height:
        top = frame_top - height
    elif frame_bottom - frame_top > 2 * height:
        top = frame_top
    else:
        top = frame_bottom
    right = left + width
    bottom = top + height
    draw.rectangle((left, top, right, bottom), colour)
    red, green, blue = colour
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    ink = "black" if brightness > _MIDDLE_GREY else "white"
    middle = left + _PAD_PX, top + height / 2
    draw.text(middle, text, ink, _font(), anchor="lm")


def _scale_frame(box: Sequence[float], factor: float) -> Frame:
    x, y, width, height = (value * factor for value in box)
    right = x + max(width, 1)
    bottom = y + max(height, 1)
    return x, y, right, bottom


def _choose_colour(label: int, num_classes: int) -> Colour:
    red, green, blue = palette(num_classes)[label].tolist()
    return red, green, blue


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, _TEXT_PX)
