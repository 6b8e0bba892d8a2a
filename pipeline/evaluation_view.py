"""What evaluation shows a network of an image, and how maps of that get the image's own size again.

    classification  the short side resized to size / crop_pct ──▶ the centre cropped, [size, size]
    other tasks     resized to task.sides ──▶ padded below and at the right to multiples of CANVAS_DIVISOR
    maps of logits  [K, H / 4, W / 4] ──▶ [K, H, W] ──▶ the padding cut off ──▶ [K, height, width]

The feed, models that are served, and exports all follow these rules. Sizes are heights and widths in pixels: `hw` and
arrays that are returned have shape [n, 2], or [n, 1] for factors.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.config import ImageConfig, TaskConfig
from pvt.model import STRIDES

CANVAS_DIVISOR = STRIDES[-1]
"""Sides of the network's input are multiples of this, in pixels: it takes whole tokens of its coarsest stage."""

Array = npt.NDArray[Any]
Size = tuple[int, int]
"""Height and width."""


def short_side_before_crop(image: ImageConfig, size: int) -> int:
    """Returns the short side that an image is resized to before the centre, [size, size], is cropped."""
    # timm rounds down, too.
    return int(size / image.crop_pct)


def short_side_sizes(short: int, hw: Array) -> Array:
    """Returns the sizes of images whose short side becomes `short`. torchvision's Resize rounds in the same way."""
    hw = hw.astype(np.int64)
    return short * hw // hw.min(axis=1, keepdims=True)


def central_corners(resized: Array, size: int) -> Array:
    """Returns the upper left corners of centres. torchvision's CenterCrop rounds in the same way."""
    return np.rint((resized - size) / 2).astype(np.int32)


def resize_factors(short: int | Array, long: int, hw: Array) -> Array:
    """Returns the factor that makes the short side `short`, unless the long one would exceed `long`."""
    for_short_side = short / hw.min(axis=1, keepdims=True)
    for_long_side = long / hw.max(axis=1, keepdims=True)
    return np.minimum(for_short_side, for_long_side)


def scaled_sizes(hw: Array, factors: Array) -> Array:
    # A very long image could otherwise lose its short side to rounding.
    return np.maximum(1, np.rint(hw * factors)).astype(np.int64)


def whole_size(task: TaskConfig, image: ImageConfig, height: int, width: int) -> Size:
    """Returns the height and width that an image is resized to for a task whose network sees all of it."""
    hw = np.array([[height, width]])
    short, long = task.sides(image)
    height, width = scaled_sizes(hw, resize_factors(short, long, hw))[0].tolist()
    return height, width


def crop_centre(picture: Image.Image, image: ImageConfig, size: int) -> Image.Image:
    """Returns the centre, [size, size], of an RGB image with its short side resized."""
    hw = np.array([[picture.height, picture.width]])
    resized = short_side_sizes(short_side_before_crop(image, size), hw)
    ((top, left),) = central_corners(resized, size).tolist()
    return _resize(picture, image, *resized[0].tolist()).crop((left, top, left + size, top + size))


def resize_whole(picture: Image.Image, task: TaskConfig, image: ImageConfig) -> Image.Image:
    """Resizes an RGB image for a network that sees all of it."""
    return _resize(picture, image, *whole_size(task, image, picture.height, picture.width))


def _resize(picture: Image.Image, image: ImageConfig, height: int, width: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling[image.interpolation.upper()])


def normalise(picture: Image.Image, image: ImageConfig) -> Tensor:
    """Returns an RGB image's normalised values, [3, H, W]."""
    mean, std = _statistics(image)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (values / 255 - mean) / std


def to_picture(values: Tensor, image: ImageConfig) -> Image.Image:
    """Returns the picture whose normalised values, [3, H, W], these are."""
    mean, std = _statistics(image)
    pixels = 255 * (values * std + mean)
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def scaled_statistics(image: ImageConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns what normalises pixels in 0 … 255, each [3, 1, 1]: a mean to subtract and a scale to multiply by."""
    # The statistics are scaled instead of the pixels: one operation less for each image.
    mean, std = _statistics(image).to(device)
    return 255 * mean, 1 / (255 * std)


def _statistics(image: ImageConfig) -> Tensor:
    """Returns mean and standard deviation, [2, 3, 1, 1]."""
    return torch.tensor([image.mean, image.std])[:, :, None, None]


def pad_to_canvas(values: Tensor) -> Tensor:
    """Adds zeros below and at the right of [3, H, W], up to multiples of CANVAS_DIVISOR."""
    # -side % divisor is what a side lacks to the next multiple.
    below = -values.shape[1] % CANVAS_DIVISOR
    right = -values.shape[2] % CANVAS_DIVISOR
    return functional.pad(values, (0, right, 0, below))


def resize_to_canvas(logits: Tensor) -> Tensor:
    """Resizes logits [N, K, H / 4, W / 4] to [N, K, H, W] float32."""
    return functional.interpolate(logits.float(), scale_factor=STRIDES[0], mode="bilinear", align_corners=False)


def resize_to_image(logits: Tensor, extent: Size, size: Size) -> Tensor:
    """Resizes one image's logits [K, H / 4, W / 4] to [K, height, width] float32.

    `extent`: the height and width of the canvas [H, W] that the image filled, from the upper left. `size`: the image's
    own height and width.
    """
    height, width = extent
    seen = resize_to_canvas(logits[None])[..., :height, :width]
    return functional.interpolate(seen, size, mode="bilinear", align_corners=False)[0]
