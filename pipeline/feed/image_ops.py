"""What augment.py decided, done to pixels: resize, flip, operations, normalise, erase. PIL's results, in torch.

uint8 images of any size ─▶ resize, crop ─▶ [n, h, w, 3] uint8 ─▶ finish ─▶ [n, 3, H, W] float32, padded with zeros

The same code runs on CPU threads, an image at a time, and on a GPU, a batch at a time. Operations take images
[n, 3, H, W] uint8 and arguments [n] float32, and follow Pillow's arithmetic: its rounding and its borders.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import keys
from pipeline.config import ImageConfig
from pipeline.feed.augment import NOISE, Op, Views
from pipeline.feed.transfer import to_device


class Finisher:
    """Turns resized images into the network's input. `noise` fills erased boxes; None fills them with zeros."""

    def __init__(self, image: ImageConfig, device: torch.device, noise: Tensor | None = None) -> None:
        self._mean = 255 * torch.tensor(image.mean, device=device)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(image.std, device=device)[:, None, None])
        # What geometric operations bring in from outside: the mean colour, as timm rounds it.
        fill = [min(255, round(255 * mean)) for mean in image.mean]
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device)[:, None, None]
        self._noise = noise
        self._interpolation = image.interpolation

    def finish_window(self, window: Tensor, view: Views, out: Tensor) -> None:
        """Resize a decoded window [h, w, 3] uint8, crop it and finish it into `out` [1, 3, H, W], as `view` says."""
        (top, left), (height, width) = view.corner[0].tolist(), view.extent[0].tolist()
        image = resize(window, view.resized[0].tolist(), self._interpolation)
        self.finish(image[None, top : top + height, left : left + width], view, out)

    def finish(self, images: Tensor, views: Views, out: Tensor) -> None:
        """Flip, augment, normalise and erase `images` [n, h, w, 3] uint8 into the upper left of `out` [n, 3, H, W]
        float32; the rest of it becomes zero."""
        height, width = images.shape[1:3]
        out[:, :, height:].zero_()
        out[:, :, :, width:].zero_()
        out = out[:, :, :height, :width]
        images = images.permute(0, 3, 1, 2).contiguous()
        flip, args, by_op = to_device([views.flip, views.args, _by_op(views.ops)], images.device)
        if len(images) == 1:
            images = images.flip(3) if views.flip[0] else images
        elif views.flip.any():
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
        for layer in zip(views.ops, args, by_op, strict=True):
            images = apply(images, *layer, self._fill)
        out.copy_(images)  # torch converts several times faster than it subtracts mixed types
        out.sub_(self._mean).mul_(self._scale)
        for image, box, place in zip(out, views.erase.tolist(), views.noise.tolist(), strict=True):
            self._erase(image, box, place)

    def _erase(self, image: Tensor, box: list[int], place: float) -> None:
        top, bottom, left, right = box
        if bottom == top:
            return
        patch = image[:, top:bottom, left:right]
        if self._noise is None:
            patch.zero_()
        else:
            first = int(place * (len(self._noise) - patch.numel()))
            patch.copy_(self._noise[first : first + patch.numel()].view(patch.shape))


def noise(seed: int, device: torch.device) -> Tensor:
    """A run's standard normal draws for erased boxes. Each box takes a stretch of them, so the cost is a copy."""
    draws = keys.generator(keys.key(seed, keys.Stream.ERASE)).standard_normal(NOISE, np.float32)
    return torch.from_numpy(draws).to(device)


def resize(image: Tensor, shape: Sequence[int], interpolation: str) -> Tensor:
    """Resize [h, w, 3] uint8 to `shape` with the antialiasing filter that Pillow uses, to within a grey level.

    On the CPU torch does it with Pillow's integer arithmetic, vectorised: 9 times as fast as DALI's resize there.
    """
    batch = image.permute(2, 0, 1)[None]
    if interpolation == "nearest":
        resized = F.interpolate(batch, size=tuple(shape), mode="nearest-exact")
    else:
        resized = F.interpolate(batch, size=tuple(shape), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def apply(images: Tensor, ops: np.ndarray, args: Tensor, by_op: Tensor, fill: Tensor) -> Tensor:
    """One layer: each image's own operation, `ops` [n] of Op, with its argument, `args` [n].

    `by_op` [n] int64 are the images' positions, sorted by operation; `fill` [3, 1, 1] uint8 is the colour of what
    geometric operations bring in from outside.
    """
    if len(ops) == 1:
        return _OPERATIONS[Op(int(ops[0]))](images, args, fill)
    images = images.clone()
    drawn, counts = np.unique(ops, return_counts=True)
    for op, chosen in zip(drawn, by_op.split(counts.tolist()), strict=True):
        images[chosen] = _OPERATIONS[Op(int(op))](images[chosen], args[chosen], fill)
    return images


def _by_op(ops: np.ndarray) -> np.ndarray:
    """Returns the positions of images sorted by operation, [P, n] int64, for P layers of operations."""
    return np.argsort(ops, axis=1, kind="stable")


Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def _identity(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return images


# --- Each value by itself: a table of 256 entries for each image or for each of its channels. ---


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Map values through `tables`, [n, 1 or 3, 256] of values in 0 … 255."""
    tables = tables.to(torch.uint8)
    if tables.shape[:2] == (1, 1):
        return tables.flatten().index_select(0, images.flatten().int()).view(images.shape)
    bins = _bins(images)
    return tables.expand(len(images), 3, 256).flatten().index_select(0, bins.flatten()).view(images.shape)


def _bins(images: Tensor) -> Tensor:
    """The number of each value's bin, of 256 for each image and channel."""
    first = torch.arange(0, len(images) * 768, 256, dtype=torch.int32, device=images.device)
    return images + first.view(-1, 3, 1, 1)


def _histograms(images: Tensor) -> Tensor:
    """How often each value occurs, [n, 3, 256]."""
    count = _count_by_scattering if images.is_cuda else torch.bincount
    return count(_bins(images).flatten(), minlength=len(images) * 768).view(-1, 3, 256)


def _count_by_scattering(bins: Tensor, minlength: int) -> Tensor:
    """torch.bincount for numbers below `minlength`. On a GPU the former waits, to look for the largest."""
    counts = torch.zeros(minlength, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins.long(), counts.new_ones(1).expand(len(bins)))


def _levels(like: Tensor) -> Tensor:
    return torch.arange(256, device=like.device).view(1, 1, 256)


def _auto_contrast(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Stretch each channel's range to 0 … 255."""
    levels, values = _levels(images), images.flatten(2)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    scale = 255 / (high - low).clamp(min=1)
    stretched = (levels * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels.double()))


def _equalize(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Make each channel's values equally frequent."""
    levels, counts = _levels(images), _histograms(images)
    present = counts > 0
    last = torch.where(present, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    below = counts.cumsum(-1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where((step > 0) & (present.sum(-1, keepdim=True) > 1), table, levels))


def _invert(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: Tensor, _: Tensor) -> Tensor:
    return images & (256 - 2.0 ** (8 - bits)).to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(images: Tensor, threshold: Tensor, _: Tensor) -> Tensor:
    levels = _levels(images)
    return _look_up(images, torch.where(levels < threshold.view(-1, 1, 1), levels, 255 - levels))


def _solarize_add(images: Tensor, added: Tensor, _: Tensor) -> Tensor:
    levels = _levels(images)
    return _look_up(images, torch.where(levels < 128, (levels + added.view(-1, 1, 1)).clamp(max=255), levels))


def _brightness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return _look_up(images, _blend(torch.zeros(1, device=images.device), _levels(images), factor.view(-1, 1, 1)))


def _contrast(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    mean = (_grey(images).sum((1, 2, 3)).double() / images[0, 0].numel() + 0.5).floor().view(-1, 1, 1)
    return _look_up(images, _blend(mean.float(), _levels(images), factor.view(-1, 1, 1)))


# --- A pixel's other channels, or its neighbours. ---


def _color(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return _blend(_grey(images).float(), images, factor.view(-1, 1, 1, 1)).to(torch.uint8)


def _sharpness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """Away from, or towards, the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the border stays."""
    values = images.to(torch.int16)
    sums = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    sums = sums[..., :-2, :] + sums[..., 1:-1, :] + sums[..., 2:, :] + 4 * values[..., 1:-1, 1:-1]
    smooth = (sums.float() / 13 + 0.5).floor_()
    sharp = images.clone()
    sharp[..., 1:-1, 1:-1] = _blend(smooth, images[..., 1:-1, 1:-1], factor.view(-1, 1, 1, 1)).to(torch.uint8)
    return sharp


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601 luma in Pillow's fixed point, [n, 1, H, W] int32."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """Factor 0 gives `degenerate`, 1 gives `values`, more goes beyond; truncated to whole values as Pillow does."""
    return (degenerate + factor * (values - degenerate)).clamp_(0, 255).trunc_()


# --- Geometry, bicubic as Pillow's: pixel centres at 0.5, the border repeated, `fill` outside. ---


def _shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    return _shift_rows(images, factor[:, None] * rows, fill)


def _translate_x(images: Tensor, fraction: Tensor, fill: Tensor) -> Tensor:
    return _shift_rows(images, (fraction * images.shape[3])[:, None].expand(-1, images.shape[2]), fill)


def _transposed(operation: Operation) -> Operation:
    def operate(images: Tensor, args: Tensor, fill: Tensor) -> Tensor:
        return operation(images.mT.contiguous(), args, fill).mT.contiguous()

    return operate


def _shift_rows(images: Tensor, shift: Tensor, fill: Tensor) -> Tensor:
    """Move each row to the left by its own distance in pixels, `shift` [n, H]: cubic in one dimension is enough."""
    width = images.shape[3]
    whole = shift.floor()
    # Four neighbours of each pixel, in one gather: those of the next pixel are the same, one further on.
    taps = (torch.arange(-1, width + 2, device=images.device) + whole.long()[..., None]).clamp_(0, width - 1)
    taps = images.gather(3, taps[:, None].expand(-1, 3, -1, -1)).float()
    sampled = torch.zeros_like(images, dtype=torch.float32)
    for number, weight in enumerate(_cubic_weights(shift - whole)):
        sampled.addcmul_(taps[..., number : number + width], weight[:, None, :, None])
    source = torch.arange(width, device=images.device) + 0.5 + shift[:, None, :, None]
    return _fill_outside(sampled.add_(1e-3).trunc_(), (source >= 0) & (source < width), fill)


def _cubic_weights(fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the neighbours at -1, 0, 1 and 2, for a point `fraction` after 0: Keys' cubic with a = -1."""
    t, u = fraction, 1 - fraction
    return -t * u * u, u * (1 + t - t * t), t * (1 + u - u * u), -t * t * u


def _rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """torch's cubic has a = -0.75, which is what sets the result apart from Pillow's."""
    height, width = images.shape[2:]
    cos, sin = torch.cos(torch.deg2rad(degrees)).view(-1, 1, 1), torch.sin(torch.deg2rad(degrees)).view(-1, 1, 1)
    # On a scale of -1 to 1 in both directions, as grid_sample takes them.
    x = (torch.arange(width, device=images.device) + 0.5) * (2 / width) - 1
    y = ((torch.arange(height, device=images.device) + 0.5) * (2 / height) - 1)[:, None]
    grid = torch.empty(len(images), height, width, 2, device=images.device)
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
    inside = (source_x.abs() < 1) & (source_y.abs() < 1)
    return _fill_outside(sampled.round_(), inside[:, None], fill)


def _fill_outside(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    # Whole values, so that this is exact, and in floating point, where torch does it several times faster.
    return torch.lerp(fill.float().expand_as(values), values.clamp_(0, 255), inside.float()).to(torch.uint8)


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
    Op.SHEAR_Y: _transposed(_shear_x),
    Op.TRANSLATE_X: _translate_x,
    Op.TRANSLATE_Y: _transposed(_translate_x),
}
