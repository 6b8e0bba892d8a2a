"""What happens to each image, as numbers: crop window, resize region, flip. Drawn by key, applied by the DALI graph.

A view is decoded as `anchor, shape` (whole pixels, so that the decoder can skip the rest) and then `roi_start,
roi_end` of that (fractions of a pixel allowed) is resized to the output. Both training and evaluation views are of
this form, which is why one graph serves both. All coordinates are (y, x) in pixels.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import config, keys

Array = npt.NDArray[Any]

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Views:
    """Parameters of n views, in the order in which the DALI graph takes them."""

    anchor: Array  # [n, 2] int32
    shape: Array  # [n, 2] int32
    roi_start: Array  # [n, 2] float32, relative to the anchor
    roi_end: Array  # [n, 2] float32
    flip: Array  # [n] int32, 1 to mirror left to right


def training_views(settings: config.Augment, key: keys.Key, height: Array, width: Array) -> Views:
    """A random resized crop and flip for each image; `key` [n, 2], `height` and `width` [n].

    The distribution is torchvision's RandomResizedCrop: area uniform in crop_scale, log of the aspect ratio uniform
    in crop_ratio, up to ten attempts to fit inside the image, then the largest centred window with a ratio in range.
    """
    draws = keys.uniform(key, _ATTEMPTS * 4 + 1)
    attempts = draws[:, :-1].reshape(-1, _ATTEMPTS, 4)  # area, ratio, y, x
    h, w = height.astype(np.float64)[:, None], width.astype(np.float64)[:, None]
    low, high = settings.crop_scale
    area = h * w * (low + (high - low) * attempts[..., 0])
    low, high = np.log(settings.crop_ratio)
    ratio = np.exp(low + (high - low) * attempts[..., 1])
    crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (crop_w > 0) & (crop_w <= w) & (crop_h > 0) & (crop_h <= h)
    chosen = np.arange(len(fits)), fits.argmax(axis=1)
    top = np.floor(attempts[..., 2] * (h - crop_h + 1))
    left = np.floor(attempts[..., 3] * (w - crop_w + 1))
    window = np.stack([top[chosen], left[chosen], crop_h[chosen], crop_w[chosen]], axis=-1)
    window = np.where(fits.any(axis=1)[:, None], window, _central_window(settings.crop_ratio, h[:, 0], w[:, 0]))

    shape = window[:, 2:].astype(np.int32)
    return Views(
        anchor=window[:, :2].astype(np.int32),
        shape=shape,
        roi_start=np.zeros(shape.shape, np.float32),
        roi_end=shape.astype(np.float32),
        flip=(draws[:, -1] < settings.hflip).astype(np.int32),
    )


def _central_window(crop_ratio: tuple[float, float], height: Array, width: Array) -> Array:
    ratio = np.clip(width / height, *crop_ratio)
    crop_w, crop_h = np.minimum(width, np.rint(height * ratio)), np.minimum(height, np.rint(width / ratio))
    return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=-1)


def evaluation_views(image_size: int, crop_pct: float, height: Array, width: Array) -> Views:
    """Resize the short side to image_size / crop_pct and crop the centre, as torchvision's Resize and CenterCrop do.

    Expressed as the region of the source that the crop shows, which resizes the crop's pixels alone.
    """
    short_side = int(image_size / crop_pct)
    source = np.stack([height, width], axis=-1).astype(np.float64)
    resized = np.floor(short_side * source / source.min(axis=1, keepdims=True))
    corner = np.rint((resized - image_size) / 2)
    scale = source / resized
    return Views(
        anchor=np.zeros(source.shape, np.int32),
        shape=source.astype(np.int32),
        roi_start=(corner * scale).astype(np.float32),
        roi_end=((corner + image_size) * scale).astype(np.float32),
        flip=np.zeros(len(source), np.int32),
    )
