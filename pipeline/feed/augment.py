"""What happens to each image, as numbers drawn by key: crop, resize, flip, colour operations, erased box.

    decode window `anchor, shape` ─▶ resize to `resized` ─▶ `extent` at `corner` ─▶ flip ─▶ ops ─▶ normalise ─▶ erase
                                                                                                      ─▶ pad to `canvas`

The window is whole pixels, so that the decoder can skip the rest of the image. Training and evaluation views of all
tasks have this one form. random_ops.py draws the operations, dali.py decodes, and image_ops.py does the rest.
All coordinates are (y, x) in pixels.

Shapes: n images, P layers of operations, A other anchors.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline import keys
from pipeline.config import AugmentConfig, DenseConfig, DetectionConfig, ImageConfig, SemanticFpnConfig
from pipeline.evaluation_view import (
    CANVAS_DIVISOR,
    Array,
    central_corners,
    resize_factors,
    scaled_sizes,
    short_side_before_crop,
    short_side_sizes,
)
from pipeline.feed.random_ops import ATTEMPTS, draw_erased_boxes, draw_operations


@dataclasses.dataclass(frozen=True)
class Views:
    """Parameters of n views, on canvases of one size."""

    # Height and width of the network's input.
    canvas: tuple[int, int]
    # [n, 2] int32: the upper left corner of the window to decode.
    anchor: Array
    # [n, 2] int32: height and width of the window.
    shape: Array
    # [n, 2] int32: the size that the window is resized to.
    resized: Array
    # [n, 2] int32: the upper left corner of the crop, in the resized window.
    corner: Array
    # [n, 2] int32: the size of the crop. It fills the upper left of the canvas; the rest is padding.
    extent: Array
    # [n] bool: whether to mirror left to right.
    flip: Array
    # [P, n] int64 of Op, applied in this order.
    ops: Array
    # [P, n] float32: the operations' arguments.
    args: Array
    # [n, 4] int64: top, bottom, left, right of the erased box, which is empty where nothing is erased.
    erase: Array
    # [n] float64 in [0, 1): where in the noise the filling of the box begins.
    noise: Array
    # [n, A, 2] int32: anchors to try in turn where the first one shows what the task does not want.
    other_anchors: Array

    def __getitem__(self, images: slice) -> "Views":
        arrays = {}
        for name in _ARRAYS:
            array = getattr(self, name)
            arrays[name] = array[:, images] if name in _BY_LAYER else array[images]
        return Views(self.canvas, **arrays)

    @classmethod
    def joined(cls, views: Sequence["Views"]) -> "Views":
        """Returns views of one canvas, one behind the other."""
        arrays = {}
        for name in _ARRAYS:
            axis = 1 if name in _BY_LAYER else 0
            arrays[name] = np.concatenate([getattr(each, name) for each in views], axis)
        return cls(views[0].canvas, **arrays)

    def nearest(self) -> tuple[Array, Array]:
        """Returns the stored image's rows, [h], and columns, [w], at the centres of what this one view shows.

        It is meant for maps of the image: `map[rows][:, columns]` cuts, resizes and flips a map as the view does.
        """
        rows = self._find_nearest(0)
        columns = self._find_nearest(1)
        if self.flip[0]:
            columns = columns[::-1]
        return rows, columns

    def _find_nearest(self, axis: int) -> Array:
        centres = np.arange(self.extent[0, axis]) + self.corner[0, axis] + 0.5
        in_window = centres * self.shape[0, axis] // self.resized[0, axis]
        return in_window.astype(np.int64) + self.anchor[0, axis]


_ARRAYS = [field.name for field in dataclasses.fields(Views) if field.name != "canvas"]
# The first axis of these arrays is the layers, and the second the images.
_BY_LAYER = ("ops", "args")


def training_views(
    config: AugmentConfig,
    image: ImageConfig,
    size: int,
    key: keys.Key,
    hw: Array,
) -> Views:
    """Returns a random view of each image: `key` [n, 2], heights and widths `hw` [n, 2]."""
    draws = keys.uniform(key, ATTEMPTS * 4 + 1)
    if config.crop == "center":
        view = evaluation_views(image, size, hw)
    elif config.crop == "plain":
        view = _short_side_views(size, size, hw)
        num_corners = view.resized - size + 1
        corner = np.floor(draws[:, :2] * num_corners)
        view = dataclasses.replace(view, corner=corner.astype(np.int32))
    else:
        attempts = draws[:, :-1].reshape(-1, ATTEMPTS, 4)
        anchor, window = _draw_window(config, attempts, hw)
        view = _plain_views(
            (size, size),
            anchor,
            window,
            np.full_like(hw, size),
        )
    erase, noise = draw_erased_boxes(config, size, keys.fold(key, 2))
    view = dataclasses.replace(view, erase=erase, noise=noise)
    return _add_operations(view, config, draws[:, -1], key)


def evaluation_views(image: ImageConfig, size: int, hw: Array) -> Views:
    """Returns views with the short side resized to size / crop_pct and the centre cropped, as torchvision's Resize and
    CenterCrop do."""
    view = _short_side_views(size, short_side_before_crop(image, size), hw)
    return dataclasses.replace(view, corner=central_corners(view.resized, size))


def whole_views(
    task: DenseConfig,
    image: ImageConfig,
    hw: Array,
) -> Views:
    """Returns views of whole images, resized as the task says."""
    short, long = task.sides(image)
    factor = resize_factors(short, long, hw)
    return _padded_views(np.zeros_like(hw), hw, factor)


def detection_views(
    config: AugmentConfig,
    task: DetectionConfig,
    image: ImageConfig,
    key: keys.Key,
    hw: Array,
) -> Views:
    """Returns views of whole images or, by chance, of windows of them, resized to a short side that is drawn, as in
    DETR (Carion et al., 2020)."""
    draws = keys.uniform(key, 8)
    anchor, window = _draw_sized_window(task, draws[:, 3:], hw)
    is_cropped = draws[:, 1:2] < task.crop_prob
    anchor = np.where(is_cropped, anchor, 0)
    window = np.where(is_cropped, window, hw)
    short, long = task.sides(image)
    sides = task.train_short_sides or (short,)
    factor = resize_factors(_choose(sides, draws[:, 2:3]), long, window)
    view = _padded_views(anchor, window, factor)
    return _add_operations(view, config, draws[:, 0], key)


def scaled_crops(
    config: AugmentConfig,
    task: SemanticFpnConfig,
    image: ImageConfig,
    key: keys.Key,
    hw: Array,
) -> Views:
    """Returns crops of image.size from images scaled at random. An image smaller than that is seen whole and padded.

    The window is what the crop shows of the stored image, so that a label map is cut and resized with it.
    """
    draws = keys.uniform(key, 2 + 2 * ATTEMPTS)
    short, long = task.sides(image)
    low, high = task.scale
    scale = low + (high - low) * draws[:, 1:2]
    factor = resize_factors(short, long, hw) * scale
    scaled = scaled_sizes(hw, factor)
    window = np.clip(np.rint(image.size / factor), 1, hw)
    window = np.where(scaled <= image.size, hw, window)
    # One anchor for each attempt: the label map decides which of them is taken.
    fractions = draws[:, 2:].reshape(-1, ATTEMPTS, 2)
    num_anchors = hw - window + 1
    anchors = np.floor(fractions * num_anchors[:, None]).astype(np.int32)
    canvas = image.size, image.size
    view = _plain_views(
        canvas,
        anchors[:, 0],
        window,
        np.minimum(scaled, image.size),
    )
    view = dataclasses.replace(view, other_anchors=anchors[:, 1:])
    return _add_operations(view, config, draws[:, 0], key)


def _add_operations(
    view: Views,
    config: AugmentConfig,
    flip_draws: Array,
    key: keys.Key,
) -> Views:
    """Returns views with flips, as uniform draws [n] decide them, and with operations on pixels."""
    # A key of their own: what operations draw does not depend on how many draws the crop takes.
    ops, args = draw_operations(config, keys.fold(key, 1))
    flip = flip_draws < config.hflip
    return dataclasses.replace(view, flip=flip, ops=ops, args=args)


def _choose(options: tuple[int, ...], draws: Array) -> Array:
    """Returns one of the options for each uniform draw."""
    number = draws * len(options)
    return np.array(options)[number.astype(np.int64)]


def _draw_sized_window(
    task: DetectionConfig,
    draws: Array,
    hw: Array,
) -> tuple[Array, Array]:
    """Returns the upper left corners of windows and their sizes, both [n, 2], in pixels of the stored images, from
    `draws` [n, 5].

    A window is drawn in the image resized to one of crop_short_sides: first each side by itself, uniform in crop_sides
    as far as the image reaches, and then the corner.
    """
    short_side = _choose(task.crop_short_sides, draws[:, :1])
    factor = short_side / hw.min(axis=1, keepdims=True)
    resized = scaled_sizes(hw, factor)
    shortest, longest = task.crop_sides
    low = np.minimum(shortest, resized)
    high = np.minimum(longest, resized)
    size = low + np.floor(draws[:, 1:3] * (high - low + 1))
    corner = np.floor(draws[:, 3:] * (resized - size + 1))
    anchor = np.rint(corner * hw / resized)
    end = np.rint((corner + size) * hw / resized)
    # Where the image was enlarged, a window of it may be less than one stored pixel.
    window = np.maximum(1, end - anchor)
    return np.minimum(anchor, hw - window), window


def _padded_views(anchor: Array, shape: Array, factor: Array) -> Views:
    """Returns views of windows resized by `factor`, on the smallest canvas that holds them all."""
    resized = scaled_sizes(shape, factor)
    largest = resized.max(axis=0)
    height, width = (largest + -largest % CANVAS_DIVISOR).tolist()
    return _plain_views((height, width), anchor, shape, resized)


def _short_side_views(size: int, short_side: int, hw: Array) -> Views:
    """Returns views of whole images, resized to a short side, of which the upper left [size, size] is cropped."""
    resized = short_side_sizes(short_side, hw)
    view = _plain_views((size, size), np.zeros_like(hw), hw, resized)
    extent = np.full_like(view.extent, size)
    return dataclasses.replace(view, extent=extent)


def _plain_views(
    canvas: tuple[int, int],
    anchor: Array,
    shape: Array,
    resized: Array,
) -> Views:
    """Returns views of all of a resized window, without any operation on its pixels."""
    n = len(anchor)
    resized = resized.astype(np.int32)
    return Views(
        canvas,
        anchor=anchor.astype(np.int32),
        shape=shape.astype(np.int32),
        resized=resized,
        corner=np.zeros((n, 2), np.int32),
        extent=resized,
        flip=np.zeros(n, bool),
        ops=np.zeros((0, n), np.int64),
        args=np.zeros((0, n), np.float32),
        erase=np.zeros((n, 4), np.int64),
        noise=np.zeros(n),
        other_anchors=np.zeros((n, 0, 2), np.int32),
    )


def _draw_window(
    config: AugmentConfig,
    attempts: Array,
    hw: Array,
) -> tuple[Array, Array]:
    """Returns the upper left corners of windows and their sizes, both [n, 2], distributed as in torchvision's
    RandomResizedCrop.

    The area is uniform in crop_scale and the log of the aspect ratio in crop_ratio. `attempts` [n, 10, 4] are the draws
    of windows, the first of which that fits inside the image is taken; if none does, the largest centred window with a
    ratio in range.
    """
    hw = hw.astype(np.float64)
    height = hw[:, :1]
    width = hw[:, 1:]
    smallest, largest = config.crop_scale
    area = height * width * (smallest + (largest - smallest) * attempts[..., 0])
    low, high = np.log(config.crop_ratio)
    ratio = np.exp(low + (high - low) * attempts[..., 1])
    crop_h = np.rint(np.sqrt(area / ratio))
    crop_w = np.rint(np.sqrt(area * ratio))
    fits_h = (crop_h > 0) & (crop_h <= height)
    fits_w = (crop_w > 0) & (crop_w <= width)
    fits = fits_h & fits_w
    top = np.floor(attempts[..., 2] * (height - crop_h + 1))
    left = np.floor(attempts[..., 3] * (width - crop_w + 1))
    windows = np.stack([top, left, crop_h, crop_w], axis=-1)
    first = windows[np.arange(len(fits)), fits.argmax(axis=1)]
    central = _find_central_window(
        config.crop_ratio,
        height[:, 0],
        width[:, 0],
    )
    window = np.where(fits.any(axis=1, keepdims=True), first, central)
    return window[:, :2], window[:, 2:]


def _find_central_window(
    crop_ratio: tuple[float, float],
    height: Array,
    width: Array,
) -> Array:
    """Returns the largest centred windows with a ratio in range, [n, 4]: top, left, height, width."""
    ratio = np.clip(width / height, *crop_ratio)
    crop_w = np.minimum(width, np.rint(height * ratio))
    crop_h = np.minimum(height, np.rint(width / ratio))
    top = (height - crop_h) // 2
    left = (width - crop_w) // 2
    return np.stack([top, left, crop_h, crop_w], axis=-1)
