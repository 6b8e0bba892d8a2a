"""Random operations on an image's pixels, drawn by key: RandAugment, colour jitter, and boxes to erase.

    key ──▶ operations and their arguments, [P, n]      (image_ops.py applies them)
        └─▶ boxes to erase, [n, 4], and what fills them

Shapes: n images, P layers of operations.
"""

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.config import AugmentConfig, RandAugment

Array = npt.NDArray[Any]

ATTEMPTS = 10
"""The number of random boxes that are tried until one fits, the same as in timm and torchvision."""
NOISE = 1 << 22
"""The number of standard normal draws that fill erased boxes. Each box reads them from an offset of its own."""


class Op(enum.IntEnum):
    """An operation on an image's pixels. The comments say what its argument means."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    # Degrees, counter-clockwise.
    ROTATE = 4
    # The number of bits that are kept.
    POSTERIZE = 5
    # The threshold from which values are inverted.
    SOLARIZE = 6
    # What is added to values below 128.
    SOLARIZE_ADD = 7
    # Four factors: 0 gives a grey, a uniform, a black and a smoothed image, and 1 changes nothing.
    COLOR = 8
    CONTRAST = 9
    BRIGHTNESS = 10
    SHARPNESS = 11
    # Pixels a row, or a column.
    SHEAR_X = 12
    SHEAR_Y = 13
    # A fraction of the width to the left, or of the height upwards.
    TRANSLATE_X = 14
    TRANSLATE_Y = 15


RAND_AUGMENT = [op for op in Op if op is not Op.IDENTITY]
_JITTERED = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]


def draw_operations(config: AugmentConfig, key: keys.Key) -> tuple[Array, Array]:
    """Returns operations, [P, n] int64 of Op, and their arguments, [P, n] float32, for keys [n, 2]."""
    if config.rand_augment:
        return _draw_rand_augment(config.rand_augment, key)
    if config.color_jitter:
        return _draw_color_jitter(config.color_jitter, key)
    shape = 0, len(key)
    return np.zeros(shape, np.int64), np.zeros(shape, np.float32)


def draw_erased_boxes(
    config: AugmentConfig,
    size: int,
    key: keys.Key,
) -> tuple[Array, Array]:
    """Returns boxes to erase, [n, 4] int64, as timm's RandomErasing draws them, and where in the noise the filling of
    each begins, [n] float64 in [0, 1)."""
    n = len(key)
    if not config.erase_prob:
        return np.zeros((n, 4), np.int64), np.zeros(n)
    draws = keys.uniform(key, ATTEMPTS * 4 + 2)
    attempts = draws[:, 2:].reshape(n, ATTEMPTS, 4)
    # timm's defaults: 2 % to a third of the area, and aspect ratios from 0.3 to 1 / 0.3.
    fraction = 0.02 + (1 / 3 - 0.02) * attempts[..., 0]
    area = size * size * fraction
    ratio = np.exp(np.log(0.3) * (1 - 2 * attempts[..., 1]))
    height = np.rint(np.sqrt(area * ratio))
    width = np.rint(np.sqrt(area / ratio))
    fits = (height < size) & (width < size)
    top = np.floor(attempts[..., 2] * (size - height + 1))
    left = np.floor(attempts[..., 3] * (size - width + 1))
    boxes = np.stack([top, top + height, left, left + width], axis=-1)
    chosen = boxes[np.arange(n), fits.argmax(axis=1)]
    is_erased = (draws[:, 0] < config.erase_prob) & fits.any(axis=1)
    erased = np.where(is_erased[:, None], chosen, 0)
    return erased.astype(np.int64), draws[:, 1]


def _draw_rand_augment(policy: RandAugment, key: keys.Key) -> tuple[Array, Array]:
    """Draws timm's RandAugment: that of Cubuk et al. (2019) with noise on the magnitude. Each layer applies one of 15
    operations to an image."""
    draws = keys.uniform(key, policy.num_layers * 5)
    draws = draws.reshape(-1, policy.num_layers, 5).transpose(2, 1, 0)
    choice, applied, first, second, sign = draws  # each [P, n]
    number = choice * len(RAND_AUGMENT)
    ops = np.array(RAND_AUGMENT)[number.astype(np.int64)]
    if np.isinf(policy.magnitude_std):
        # timm's meaning of "mstdinf": the magnitude is uniform.
        magnitude = policy.magnitude * first
    else:
        # The method of Box and Muller makes a normal draw of two uniform ones.
        radius = np.sqrt(-2 * np.log1p(-first))
        normal = radius * np.cos(2 * np.pi * second)
        magnitude = policy.magnitude + policy.magnitude_std * normal
    level = np.clip(magnitude, 0, policy.max_magnitude) / 10
    sign = np.where(sign < 0.5, 1.0, -1.0)
    args = _compute_arguments(ops, level, sign, policy.increasing)
    ops = np.where(applied < policy.prob, ops, Op.IDENTITY)
    return ops, args.astype(np.float32)


def _compute_arguments(
    ops: Array,
    level: Array,
    sign: Array,
    increasing: bool,
) -> Array:
    """Returns the arguments that timm computes from a level of 0 to 1, or more where the magnitude may exceed 10."""
    bits = np.floor(level * 4)
    threshold = np.minimum(np.floor(level * 256), 256)
    if increasing:
        # timm asks Pillow to keep 0 bits at level 1. Pillow refuses that from version 13 on; before, it gave black
        # images, and so do we.
        bits = np.maximum(4 - bits, 0)
        threshold = 256 - threshold
        factor = np.maximum(1 + sign * level * 0.9, 0.1)
    else:
        factor = level * 1.8 + 0.1
    shear = sign * level * 0.3
    translation = sign * level * 0.45
    argument = {
        Op.ROTATE: sign * level * 30,
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(np.floor(level * 110), 128),
        Op.COLOR: factor,
        Op.CONTRAST: factor,
        Op.BRIGHTNESS: factor,
        Op.SHARPNESS: factor,
        Op.SHEAR_X: shear,
        Op.SHEAR_Y: shear,
        Op.TRANSLATE_X: translation,
        Op.TRANSLATE_Y: translation,
    }
    is_op = [ops == op for op in argument]
    return np.select(is_op, list(argument.values()), 0.0)


def _draw_color_jitter(strength: float, key: keys.Key) -> tuple[Array, Array]:
    """Draws torchvision's ColorJitter of brightness, contrast and saturation, in an order of each image's own."""
    count = len(_JITTERED)
    draws = keys.uniform(key, 2 * count)
    draws = draws.reshape(-1, 2, count).transpose(1, 2, 0)
    order = np.argsort(draws[0], axis=0)
    factor = 1 + strength * (2 * draws[1] - 1)
    return np.array(_JITTERED)[order], factor.astype(np.float32)
