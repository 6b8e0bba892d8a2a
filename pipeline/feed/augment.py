"""What happens to each image, as numbers drawn by key: crop, resize, flip, colour operations, erased box.

    decode window `anchor, shape` ─▶ resize to `resized` ─▶ `extent` at `corner` ─▶ flip ─▶ ops ─▶ normalise ─▶ erase
                                                                                                      ─▶ pad to `canvas`

The window is whole pixels, so that the decoder can skip the rest of the image. Training and evaluation views of all
tasks are of this one form. dali.py decodes, pixels.py does the rest. All coordinates are (y, x) in pixels.

Shapes: n images, P layers of operations.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.config import AugmentConfig, DetectionConfig, ImageConfig, RandAugment, SemanticFpnConfig
from pvt.model import STRIDES

Array = npt.NDArray[Any]

_ATTEMPTS = 10  # at a random box that fits, as timm and torchvision make
NOISE = 1 << 22
"""Standard normal draws that erased boxes are filled from, each beginning at an offset of its own."""


class Op(enum.IntEnum):
    """An operation on an image's pixels and what its argument means."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    ROTATE = 4  # degrees, counter-clockwise
    POSTERIZE = 5  # bits kept
    SOLARIZE = 6  # threshold from which values are inverted
    SOLARIZE_ADD = 7  # added to values below 128
    COLOR = 8  # factor: 0 grey, 1 unchanged
    CONTRAST = 9
    BRIGHTNESS = 10
    SHARPNESS = 11
    SHEAR_X = 12  # pixels a row
    SHEAR_Y = 13
    TRANSLATE_X = 14  # fraction of the width, to the left
    TRANSLATE_Y = 15


RAND_AUGMENT = [op for op in Op if op is not Op.IDENTITY]
_JITTERED = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]


@dataclasses.dataclass(frozen=True)
class Views:
    """Parameters of n views, on canvases of one size."""

    canvas: tuple[int, int]  # height and width of the network's input
    anchor: Array  # [n, 2] int32, of the window to decode
    shape: Array  # [n, 2] int32
    resized: Array  # [n, 2] int32, what the window is resized to
    corner: Array  # [n, 2] int32, of the crop of that
    extent: Array  # [n, 2] int32, of the crop: the canvas's upper left; what is beside and below it is padding
    flip: Array  # [n] bool, to mirror left to right
    ops: Array  # [P, n] int64 of Op, applied in this order
    args: Array  # [P, n] float32
    erase: Array  # [n, 4] int64: top, bottom, left, right of the erased box, empty where none
    noise: Array  # [n] float64 in [0, 1): where in the noise the box's filling begins
    elsewhere: Array  # [n, A, 2] int32, anchors to take instead where the first shows what the task does not want

    def __getitem__(self, part: slice) -> "Views":
        return Views(self.canvas, **{name: value[_at(name, part)] for name, value in self._arrays()})

    @classmethod
    def joined(cls, views: Sequence["Views"]) -> "Views":
        """Of one canvas, one behind the other."""
        columns = zip(*(each._arrays() for each in views), strict=True)
        return cls(views[0].canvas, **{parts[0][0]: _joined(parts) for parts in columns})

    def nearest(self) -> tuple[Array, Array]:
        """Of one view: the stored image's rows, [h], and columns, [w], that lie at the centres of what is seen.

        For maps of the image, which `map[rows][:, columns]` cuts, resizes and flips as the view does.
        """
        rows, columns = (
            ((np.arange(extent) + corner + 0.5) * shape // resized).astype(np.int64) + anchor
            for extent, corner, shape, resized, anchor in zip(
                self.extent[0], self.corner[0], self.shape[0], self.resized[0], self.anchor[0], strict=True
            )
        )
        return rows, columns[::-1] if self.flip[0] else columns

    def _arrays(self) -> list[tuple[str, Array]]:
        return [(name, getattr(self, name)) for name in _ARRAYS]


_ARRAYS = [field.name for field in dataclasses.fields(Views) if field.name != "canvas"]
_BY_LAYER = ("ops", "args")  # whose first axis is the layers, and the second the images


def _at(name: str, part: slice) -> Any:
    return (slice(None), part) if name in _BY_LAYER else part


def _joined(parts: Sequence[tuple[str, Array]]) -> Array:
    name = parts[0][0]
    return np.concatenate([value for _, value in parts], axis=1 if name in _BY_LAYER else 0)


def training_views(config: AugmentConfig, image: ImageConfig, size: int, key: keys.Key, hw: Array) -> Views:
    """A random view of each image: `key` [n, 2], heights and widths `hw` [n, 2]."""
    draws = keys.uniform(key, _ATTEMPTS * 4 + 1)
    flip = draws[:, -1] < config.hflip
    if config.crop == "center":
        view = evaluation_views(image, size, hw)
    elif config.crop == "plain":
        view = _short_side_views(size, size, hw)
        view = dataclasses.replace(view, corner=np.floor(draws[:, :2] * (view.resized - size + 1)).astype(np.int32))
    else:
        window = _random_window(config, draws[:, :-1].reshape(-1, _ATTEMPTS, 4), hw)
        view = _plain_views((size, size), window[:, :2], window[:, 2:], np.full_like(hw, size))
    ops, args = _operations(config, keys.fold(key, 1))
    erase, noise = _erasing(config, size, keys.fold(key, 2))
    return dataclasses.replace(view, flip=flip, ops=ops, args=args, erase=erase, noise=noise)


def evaluation_views(image: ImageConfig, size: int, hw: Array) -> Views:
    """The short side resized to size / crop_pct and the centre cropped, as torchvision's Resize and CenterCrop do."""
    view = _short_side_views(size, int(size / image.crop_pct), hw)
    return dataclasses.replace(view, corner=np.rint((view.resized - size) / 2).astype(np.int32))


def whole_views(task: SemanticFpnConfig | DetectionConfig, image: ImageConfig, hw: Array) -> Views:
    """Whole images, resized as the task says."""
    return _padded_views(np.zeros_like(hw), hw, _fit(*task.sides(image), hw))


def detection_views(
    config: AugmentConfig, task: DetectionConfig, image: ImageConfig, key: keys.Key, hw: Array
) -> Views:
    """Whole images or, by chance, windows of them, resized to a short side that is drawn, as DETR's authors do."""
    draws = keys.uniform(key, 8)
    short, long = task.sides(image)
    anchor, window = _sized_window(task, draws[:, 3:], hw)
    cropped = draws[:, 1:2] < task.crop_prob
    anchor, window = np.where(cropped, anchor, 0), np.where(cropped, window, hw)
    view = _padded_views(anchor, window, _fit(_choice(task.train_short_sides or (short,), draws[:, 2:3]), long, window))
    ops, args = _operations(config, keys.fold(key, 1))
    return dataclasses.replace(view, flip=draws[:, 0] < config.hflip, ops=ops, args=args)


def scaled_crops(config: AugmentConfig, task: SemanticFpnConfig, image: ImageConfig, key: keys.Key, hw: Array) -> Views:
    """Images scaled at random, of which crops of image.size are seen; a smaller one is seen whole and padded.

    The window is what the crop shows of the stored image, so that a label map is cut and resized with it.
    """
    draws = keys.uniform(key, 2 + 2 * _ATTEMPTS)
    low, high = task.scale
    factor = _fit(*task.sides(image), hw) * (low + (high - low) * draws[:, 1:2])
    scaled = np.maximum(1, np.rint(hw * factor))
    window = np.clip(np.rint(image.size / factor), 1, hw)
    window = np.where(scaled <= image.size, hw, window)
    anchors = np.floor(draws[:, 2:].reshape(-1, _ATTEMPTS, 2) * (hw - window + 1)[:, None]).astype(np.int32)
    view = _plain_views((image.size, image.size), anchors[:, 0], window, np.minimum(scaled, image.size))
    ops, args = _operations(config, keys.fold(key, 1))
    flip = draws[:, 0] < config.hflip
    return dataclasses.replace(view, flip=flip, ops=ops, args=args, elsewhere=anchors[:, 1:])


def _fit(short: int | Array, long: int, hw: Array) -> Array:
    """The factor, [n, 1], that brings the short side to `short`, or the long one to `long` if it would be longer."""
    return np.minimum(short / hw.min(axis=1, keepdims=True), long / hw.max(axis=1, keepdims=True))


def _choice(options: tuple[int, ...], draws: Array) -> Array:
    """One of the options for each uniform draw."""
    return np.array(options)[(draws * len(options)).astype(np.int64)]


def _sized_window(task: DetectionConfig, draws: Array, hw: Array) -> tuple[Array, Array]:
    """Where windows begin and their sizes, both [n, 2], in pixels of the stored images, from `draws` [n, 5].

    Drawn in the image resized to one of crop_short_sides: each side by itself, uniform in crop_sides as far as the
    image reaches, and then the place.
    """
    factor = _choice(task.crop_short_sides, draws[:, :1]) / hw.min(axis=1, keepdims=True)
    resized = np.maximum(1, np.rint(hw * factor))
    low, high = (np.minimum(side, resized) for side in task.crop_sides)
    size = low + np.floor(draws[:, 1:3] * (high - low + 1))
    corner = np.floor(draws[:, 3:] * (resized - size + 1))
    anchor, end = np.rint(corner * hw / resized), np.rint((corner + size) * hw / resized)
    window = np.maximum(1, end - anchor)  # an image may be made larger, and its window be less than a pixel
    return np.minimum(anchor, hw - window), window


def _padded_views(anchor: Array, shape: Array, factor: Array) -> Views:
    """Windows resized by `factor`, on the smallest canvas that holds them all, in whole tokens of the coarsest
    stage."""
    resized = np.maximum(1, np.rint(shape * factor)).astype(np.int64)
    height, width = (-(-resized.max(axis=0) // STRIDES[-1]) * STRIDES[-1]).tolist()
    return _plain_views((height, width), anchor, shape, resized)


def _short_side_views(size: int, short_side: int, hw: Array) -> Views:
    hw = hw.astype(np.int64)
    resized = short_side * hw // hw.min(axis=1, keepdims=True)
    view = _plain_views((size, size), np.zeros_like(hw), hw, resized)
    return dataclasses.replace(view, extent=np.full_like(view.extent, size))


def _plain_views(canvas: tuple[int, int], anchor: Array, shape: Array, resized: Array) -> Views:
    """Views of all of a resized window, without any operation on its pixels."""
    n = len(anchor)
    anchor, shape, resized = (value.astype(np.int32) for value in (anchor, shape, resized))
    flip, no_ops, no_args = np.zeros(n, bool), np.zeros((0, n), np.int64), np.zeros((0, n), np.float32)
    corner, erase = np.zeros((n, 2), np.int32), np.zeros((n, 4), np.int64)
    noise, elsewhere = np.zeros(n), np.zeros((n, 0, 2), np.int32)
    return Views(canvas, anchor, shape, resized, corner, resized, flip, no_ops, no_args, erase, noise, elsewhere)


def _random_window(config: AugmentConfig, attempts: Array, hw: Array) -> Array:
    """Windows (top, left, height, width), [n, 4], distributed as torchvision's RandomResizedCrop.

    Area uniform in crop_scale, log of the aspect ratio uniform in crop_ratio, `attempts` [n, 10, 4] to fit inside
    the image, then the largest centred window with a ratio in range.
    """
    h, w = np.moveaxis(hw.astype(np.float64), 1, 0)[..., None]  # each [n, 1]
    low, high = config.crop_scale
    area = h * w * (low + (high - low) * attempts[..., 0])
    low, high = np.log(config.crop_ratio)
    ratio = np.exp(low + (high - low) * attempts[..., 1])
    crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (crop_w > 0) & (crop_w <= w) & (crop_h > 0) & (crop_h <= h)
    chosen = np.arange(len(fits)), fits.argmax(axis=1)
    top = np.floor(attempts[..., 2] * (h - crop_h + 1))
    left = np.floor(attempts[..., 3] * (w - crop_w + 1))
    window = np.stack([top[chosen], left[chosen], crop_h[chosen], crop_w[chosen]], axis=-1)
    return np.where(fits.any(axis=1)[:, None], window, _central_window(config.crop_ratio, h[:, 0], w[:, 0]))


def _central_window(crop_ratio: tuple[float, float], height: Array, width: Array) -> Array:
    ratio = np.clip(width / height, *crop_ratio)
    crop_w, crop_h = np.minimum(width, np.rint(height * ratio)), np.minimum(height, np.rint(width / ratio))
    return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=-1)


def _operations(config: AugmentConfig, key: keys.Key) -> tuple[Array, Array]:
    """Operations and arguments, each [P, n]."""
    if config.rand_augment:
        return _rand_augment(config.rand_augment, key)
    if config.color_jitter:
        return _color_jitter(config.color_jitter, key)
    return np.zeros((0, len(key)), np.int64), np.zeros((0, len(key)), np.float32)


def _rand_augment(policy: RandAugment, key: keys.Key) -> tuple[Array, Array]:
    """timm's RandAugment (Cubuk et al. 2019 with noise on the magnitude): each layer takes one of 15 operations."""
    draws = keys.uniform(key, policy.num_layers * 5).reshape(-1, policy.num_layers, 5).transpose(2, 1, 0)
    choice, applied, first, second, sign = draws  # each [P, n]
    ops = np.array(RAND_AUGMENT)[(choice * len(RAND_AUGMENT)).astype(np.int64)]
    if np.isinf(policy.magnitude_std):
        magnitude = policy.magnitude * first
    else:
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller
        magnitude = policy.magnitude + policy.magnitude_std * normal
    level = np.clip(magnitude, 0, policy.max_magnitude) / 10
    args = _arguments(ops, level, np.where(sign < 0.5, 1.0, -1.0), policy.increasing)
    return np.where(applied < policy.prob, ops, Op.IDENTITY), args.astype(np.float32)


def _arguments(ops: Array, level: Array, sign: Array, increasing: bool) -> Array:
    """What timm makes of a level from 0 to 1 (more where the magnitude may exceed 10)."""
    bits, threshold = np.floor(level * 4), np.minimum(np.floor(level * 256), 256)
    if increasing:
        # Pillow from 13 on refuses to keep 0 bits, which timm asks of it at level 1; here, as before, they are black.
        bits, threshold = np.maximum(4 - bits, 0), 256 - threshold
        factor = np.maximum(1 + sign * level * 0.9, 0.1)
    else:
        factor = level * 1.8 + 0.1
    argument = {
        Op.ROTATE: sign * level * 30,
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(np.floor(level * 110), 128),
        **dict.fromkeys((Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS), factor),
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), sign * level * 0.3),
        **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), sign * level * 0.45),
    }
    return np.select([ops == op for op in argument], list(argument.values()), 0.0)


def _color_jitter(strength: float, key: keys.Key) -> tuple[Array, Array]:
    """torchvision's ColorJitter of brightness, contrast and saturation, in an order of each image's own."""
    draws = keys.uniform(key, 2 * len(_JITTERED)).reshape(-1, 2, len(_JITTERED)).transpose(1, 2, 0)
    ops = np.array(_JITTERED)[np.argsort(draws[0], axis=0)]
    return ops, (1 + strength * (2 * draws[1] - 1)).astype(np.float32)


def _erasing(config: AugmentConfig, size: int, key: keys.Key) -> tuple[Array, Array]:
    """Boxes to erase, [n, 4], as timm's RandomErasing draws them, and where their filling begins, [n]."""
    n = len(key)
    if not config.erase_prob:
        return np.zeros((n, 4), np.int64), np.zeros(n)
    draws = keys.uniform(key, _ATTEMPTS * 4 + 2)
    attempts = draws[:, 2:].reshape(n, _ATTEMPTS, 4)
    area = size * size * (0.02 + (1 / 3 - 0.02) * attempts[..., 0])
    ratio = np.exp(np.log(0.3) * (1 - 2 * attempts[..., 1]))
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (height < size) & (width < size)
    top = np.floor(attempts[..., 2] * (size - height + 1))
    left = np.floor(attempts[..., 3] * (size - width + 1))
    boxes = np.stack([top, top + height, left, left + width], axis=-1)[np.arange(n), fits.argmax(axis=1)]
    erased = (draws[:, 0] < config.erase_prob) & fits.any(axis=1)
    return np.where(erased[:, None], boxes, 0).astype(np.int64), draws[:, 1]
