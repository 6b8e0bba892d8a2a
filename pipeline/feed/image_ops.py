"""Image operations in torch with Pillow's results: resize, flip, colour and geometry, normalise, erase.

uint8 images of any size ─▶ resize, crop ─▶ [n, h, w, 3] uint8 ─▶ finish ─▶ [n, 3, H, W] float32, padded with zeros

augment.py decides what happens to each image, and this module does it to the pixels. The same code runs on CPU
threads, an image at a time, and on a GPU, a batch at a time. Operations take images [n, 3, H, W] uint8 and arguments
[n] float32, and follow Pillow's arithmetic: its rounding and its borders.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import keys
from pipeline.config import ImageConfig
from pipeline.evaluation_view import scaled_statistics
from pipeline.feed.augment import Views
from pipeline.feed.random_ops import NOISE, Op
from pipeline.feed.transfer import to_device


class Finisher:
    """Turns resized images into the network's input. `noise` fills erased boxes; None fills them with zeros."""

    def __init__(
        self,
        image: ImageConfig,
        device: torch.device,
        noise: Tensor | None = None,
    ) -> None:
        self._mean, self._scale = scaled_statistics(image, device)
        # What geometric operations bring in from outside is the mean colour, as timm rounds it.
        fill = [min(255, round(255 * value)) for value in image.mean]
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device)[:, None, None]
        self._noise = noise
        self._interpolation = image.interpolation

    def finish_window(
        self,
        window: Tensor,
        view: Views,
        out: Tensor,
    ) -> None:
        """Resizes, crops and finishes a decoded window [h, w, 3] uint8 into `out` [1, 3, H, W], as `view` says."""
        self.finish_windows([window], view, out)

    def finish_windows(
        self,
        windows: Sequence[Tensor],
        views: Views,
        out: Tensor,
    ) -> None:
        """Resizes, crops and finishes n decoded windows [h, w, 3] uint8 into `out` [n, 3, H, W], as `views` say, whose
        extents are equal."""
        height, width = views.extent[0].tolist()
        crops = []
        for window, size, (top, left) in zip(windows, views.resized.tolist(), views.corner.tolist(), strict=True):
            image = resize(window, size, self._interpolation)
            crops.append(image[top : top + height, left : left + width])
        # A single one needs no copy.
        images = crops[0][None] if len(crops) == 1 else torch.stack(crops)
        self.finish(images, views, out)

    def finish(self, images: Tensor, views: Views, out: Tensor) -> None:
        """Flips, augments, normalises and erases `images` [n, h, w, 3] uint8 into the upper left of `out` [n, 3, H, W]
        float32. The rest of `out` becomes zero."""
        height, width = images.shape[1:3]
        out[:, :, height:].zero_()
        out[:, :, :, width:].zero_()
        out = out[:, :, :height, :width]
        images = images.permute(0, 3, 1, 2).contiguous()
        by_op = _sort_by_op(views.ops)
        flip, args, by_op = to_device([views.flip, views.args, by_op], images.device)
        # The views themselves say whether anything is flipped, without waiting for the device.
        if views.flip.any():
            flipped = images.flip(3)
            images = flipped if len(images) == 1 else torch.where(flip[:, None, None, None], flipped, images)
        for layer in zip(views.ops, args, by_op, strict=True):
            images = apply(images, *layer, self._fill)
        # Converted first, because torch does that several times faster than it subtracts mixed types.
        out.copy_(images)
        out.sub_(self._mean).mul_(self._scale)
        for image, box, start in zip(out, views.erase.tolist(), views.noise.tolist(), strict=True):
            self._erase(image, box, start)

    def _erase(self, image: Tensor, box: list[int], start: float) -> None:
        top, bottom, left, right = box
        if bottom == top:
            return
        patch = image[:, top:bottom, left:right]
        if self._noise is None:
            patch.zero_()
            return
        length = patch.numel()
        first = int(start * (len(self._noise) - length))
        filling = self._noise[first : first + length]
        patch.copy_(filling.view(patch.shape))


def noise(seed: int, device: torch.device) -> Tensor:
    """Returns a run's standard normal draws for erased boxes.

    They are drawn once: filling a box is then a copy of consecutive ones.
    """
    rng = keys.generator(keys.key(seed, keys.Stream.ERASE))
    draws = rng.standard_normal(NOISE, np.float32)
    return torch.from_numpy(draws).to(device)


def resize(
    image: Tensor,
    shape: Sequence[int],
    interpolation: str,
) -> Tensor:
    """Resizes [h, w, 3] uint8 to `shape` with the antialiasing filter that Pillow uses, to within a grey level.

    On the CPU torch does it with Pillow's integer arithmetic, vectorised: 9 times as fast as DALI's resize there.
    """
    batch = image.permute(2, 0, 1)[None]
    size = tuple(shape)
    if interpolation == "nearest":
        resized = F.interpolate(batch, size=size, mode="nearest-exact")
    else:
        resized = F.interpolate(
            batch,
            size=size,
            mode=interpolation,
            antialias=True,
        )
    return resized[0].permute(1, 2, 0)


def apply(
    images: Tensor,
    ops: np.ndarray,
    args: Tensor,
    by_op: Tensor,
    fill: Tensor,
) -> Tensor:
    """Applies one layer: to each image its own operation, `ops` [n] of Op, with its argument, `args` [n].

    `by_op` [n] int64 are the images' indices, sorted by operation; `fill` [3, 1, 1] uint8 is the colour of what
    geometric operations bring in from outside.
    """
    # As operations multiply and compare with tables, [n, 3, 256], and images.
    args = args.view(-1, 1, 1)
    if len(ops) == 1:
        operation = _OPERATIONS[Op(int(ops[0]))]
        return operation(images, args, fill)
    images = images.clone()
    # The groups' sizes are computed on the host, so that nobody waits for the device.
    drawn, counts = np.unique(ops, return_counts=True)
    groups = by_op.split(counts.tolist())
    for op, chosen in zip(drawn.tolist(), groups, strict=True):
        operation = _OPERATIONS[Op(op)]
        images[chosen] = operation(images[chosen], args[chosen], fill)
    return images


def _sort_by_op(ops: np.ndarray) -> np.ndarray:
    """Returns the indices of images sorted by operation, [P, n] int64, for P layers of operations."""
    return np.argsort(ops, axis=1, kind="stable")


Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of images [n, 3, H, W], arguments [n, 1, 1] and the fill colour [3, 1, 1] that returns images."""


def _identity(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return images


# --- Operations on each value by itself: a table of 256 entries for each image or for each of its channels. ---


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Maps values through `tables`, [n, 1 or 3, 256] of values in 0 … 255."""
    tables = tables.to(torch.uint8)
    if tables.shape[:2] == (1, 1):
        # One table for all values needs no bins.
        index = images.int()
    else:
        index = _compute_bins(images)
        tables = tables.expand(len(images), 3, 256)
    values = tables.flatten().index_select(0, index.flatten())
    return values.view(images.shape)


def _compute_bins(images: Tensor) -> Tensor:
    """Returns the number of each value's bin, of 256 for each image and channel."""
    first = torch.arange(
        0,
        len(images) * 768,
        256,
        dtype=torch.int32,
        device=images.device,
    )
    return images + first.view(-1, 3, 1, 1)


def _compute_histograms(images: Tensor) -> Tensor:
    """Returns how often each value occurs, [n, 3, 256]."""
    count = _count_by_scattering if images.is_cuda else torch.bincount
    bins = _compute_bins(images).flatten()
    return count(bins, minlength=len(images) * 768).view(-1, 3, 256)


def _count_by_scattering(bins: Tensor, minlength: int) -> Tensor:
    """Counts as torch.bincount does, for numbers below `minlength`.

    On a GPU bincount waits for the device, because it looks for the largest number.
    """
    counts = torch.zeros(minlength, dtype=torch.int64, device=bins.device)
    ones = counts.new_ones(1).expand(len(bins))
    return counts.scatter_add_(0, bins.long(), ones)


def _list_levels(images: Tensor) -> Tensor:
    """Returns all values, [1, 1, 256] int64, on the images' device."""
    return torch.arange(256, device=images.device).view(1, 1, 256)


def _auto_contrast(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Stretches each channel's range to 0 … 255."""
    levels = _list_levels(images)
    values = images.flatten(2)
    low = values.amin(2, keepdim=True).double()
    high = values.amax(2, keepdim=True).double()
    scale = 255 / (high - low).clamp(min=1)
    stretched = (levels * scale - low * scale).trunc().clamp(0, 255)
    # A channel of one value stays as it is.
    tables = torch.where(high > low, stretched, levels.double())
    return _look_up(images, tables)


def _equalize(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Makes each channel's values equally frequent."""
    levels = _list_levels(images)
    counts = _compute_histograms(images)
    is_present = counts > 0
    last = torch.where(is_present, levels, 0).amax(-1, keepdim=True)
    # Pillow does not count the largest value that occurs.
    others = counts.sum(-1, keepdim=True) - counts.gather(-1, last)
    step = others // 255
    below = counts.cumsum(-1) - counts
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    # A channel of one value, and one with too few pixels for a step, stay as they are.
    is_changed = (step > 0) & (is_present.sum(-1, keepdim=True) > 1)
    tables = torch.where(is_changed, equalized, levels)
    return _look_up(images, tables)


def _invert(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: Tensor, _: Tensor) -> Tensor:
    mask = 256 - 2.0 ** (8 - bits)
    return images & mask.to(torch.uint8)[..., None]


def _solarize(images: Tensor, threshold: Tensor, _: Tensor) -> Tensor:
    levels = _list_levels(images)
    tables = torch.where(levels < threshold, levels, 255 - levels)
    return _look_up(images, tables)


def _solarize_add(images: Tensor, addend: Tensor, _: Tensor) -> Tensor:
    levels = _list_levels(images)
    added = (levels + addend).clamp(max=255)
    return _look_up(images, torch.where(levels < 128, added, levels))


def _brightness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    black = torch.zeros(1, device=images.device)
    tables = _blend(black, _list_levels(images), factor)
    return _look_up(images, tables)


def _contrast(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    num_pixels = images[0, 0].numel()
    total = _compute_grey(images).sum((1, 2, 3)).double()
    # Pillow rounds the mean.
    mean = (total / num_pixels + 0.5).floor().view(-1, 1, 1)
    tables = _blend(mean.float(), _list_levels(images), factor)
    return _look_up(images, tables)


# --- Operations on a pixel and its other channels, or its neighbours. ---


def _color(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    grey = _compute_grey(images).float()
    return _blend(grey, images, factor[..., None]).to(torch.uint8)


def _sharpness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """Moves the image away from, or towards, itself smoothed by (1 1 1, 1 5 1, 1 1 1) / 13. The border stays."""
    values = images.to(torch.int16)
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    sums = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    # Each of the 9 pixels is in the sum once, and the centre takes 4 more.
    sums = sums + 4 * values[..., 1:-1, 1:-1]
    smooth = (sums.float() / 13 + 0.5).floor_()
    inner = images[..., 1:-1, 1:-1]
    sharp = images.clone()
    sharp[..., 1:-1, 1:-1] = _blend(smooth, inner, factor[..., None]).to(torch.uint8)
    return sharp


def _compute_grey(images: Tensor) -> Tensor:
    """Returns ITU-R 601 luma in Pillow's fixed point, [n, 1, H, W] int32."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """Returns `degenerate` at factor 0, `values` at 1 and what lies beyond at more, truncated to whole values as Pillow
    does."""
    blended = degenerate + factor * (values - degenerate)
    return blended.clamp_(0, 255).trunc_()


# --- Geometry, bicubic like Pillow's: pixel centres at 0.5, the border repeated, `fill` outside. ---


def _shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    return _shift_rows(images, factor[..., 0] * rows, fill)


def _translate_x(images: Tensor, fraction: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[2:]
    distance = fraction[..., 0] * width
    return _shift_rows(images, distance.expand(-1, height), fill)


def _transpose(operation: Operation) -> Operation:
    """Returns an operation that does to columns what the given one does to rows."""

    def operate(images: Tensor, args: Tensor, fill: Tensor) -> Tensor:
        transposed = operation(images.mT.contiguous(), args, fill)
        return transposed.mT.contiguous()

    return operate


def _shift_rows(images: Tensor, shift: Tensor, fill: Tensor) -> Tensor:
    """Moves each row to the left by its own distance in pixels, `shift` [n, H].

    Only the position in the row changes, so interpolation is cubic in one dimension.
    """
    width = images.shape[3]
    device = images.device
    whole = shift.floor()
    # Four neighbours of each pixel, in one gather: those of the next pixel are the same, one further on.
    columns = torch.arange(-1, width + 2, device=device) + whole.long()[..., None]
    columns = columns.clamp_(0, width - 1)[:, None].expand(-1, 3, -1, -1)
    taps = images.gather(3, columns).float()
    sampled = torch.zeros_like(images, dtype=torch.float32)
    for number, weight in enumerate(_compute_cubic_weights(shift - whole)):
        sampled.addcmul_(taps[..., number : number + width], weight[:, None, :, None])
    # A weighted sum that is a whole number may come out a little smaller, and be truncated to the one below.
    sampled.add_(1e-3).trunc_()
    source = torch.arange(width, device=device) + 0.5 + shift[:, None, :, None]
    is_inside = (source >= 0) & (source < width)
    return _fill_outside(sampled, is_inside, fill)


def _compute_cubic_weights(fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the weights of the neighbours at -1, 0, 1 and 2 for a point `fraction` after 0, by Keys' cubic
    convolution (1981) with a = -1."""
    t = fraction
    u = 1 - fraction
    return (
        -t * u * u,
        u * (1 + t - t * t),
        t * (1 + u - u * u),
        -t * t * u,
    )


def _rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Rotates images about their centres. torch's cubic filter has a = -0.75, so that results are close to Pillow's but
    not equal to them."""
    height, width = images.shape[2:]
    device = images.device
    angle = torch.deg2rad(degrees)
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    # Coordinates from -1 to 1 in both directions, as grid_sample takes them.
    x = (torch.arange(width, device=device) + 0.5) * (2 / width) - 1
    y = (torch.arange(height, device=device) + 0.5) * (2 / height) - 1
    y = y[:, None]
    grid = torch.empty(len(images), height, width, 2, device=device)
    source_x, source_y = grid.unbind(-1)
    torch.sub(cos * x, sin * (height / width) * y, out=source_x)
    torch.add(sin * (width / height) * x, cos * y, out=source_y)
    sampled = F.grid_sample(
        images.float(),
        grid,
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    is_inside = (source_x.abs() < 1) & (source_y.abs() < 1)
    return _fill_outside(sampled.round_(), is_inside[:, None], fill)


def _fill_outside(
    values: Tensor,
    is_inside: Tensor,
    fill: Tensor,
) -> Tensor:
    """Returns `values`, clamped to 0 … 255, where they are inside, and `fill` elsewhere, as uint8."""
    # Values are whole, so that interpolating by 0 or 1 is exact. In floating point torch does it several times faster
    # than torch.where chooses among integers.
    values = values.clamp_(0, 255)
    outside = fill.float().expand_as(values)
    return torch.lerp(outside, values, is_inside.float()).to(torch.uint8)


_OPERATIONS: dict[Op, Operation] = {
    Op.IDENTITY: _identity,
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: _invert,
    Op.ROTATE: _rotate,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.BRIGHTNESS: _brightness,
    Op.SHARPNESS: _sharpness,
    Op.SHEAR_X: _shear_x,
    Op.SHEAR_Y: _transpose(_shear_x),
    Op.TRANSLATE_X: _translate_x,
    Op.TRANSLATE_Y: _transpose(_translate_x),
}
