"""What evaluation shows of an image, beside timm's transform, and how maps get the image's size again."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch.nn.functional import interpolate

from pipeline.config import ImageConfig
from pipeline.evaluation_view import (
    crop_centre,
    normalise,
    pad_to_canvas,
    resize_to_image,
    scaled_statistics,
    to_picture,
)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.8), (96, 0.875), (32, 1.0)])
def test_centre_crops_equal_timm_bit_for_bit(interpolation: Any, size: int, crop_pct: float) -> None:
    image = ImageConfig(size=size, crop_pct=crop_pct, interpolation=interpolation)
    for height, width in ((33, 200), (200, 33), (97, 98), (64, 64), (301, 173)):
        given = picture(height, width)
        transform: Any = create_transform(
            (3, size, size), interpolation=interpolation, mean=image.mean, std=image.std, crop_pct=crop_pct
        )
        assert torch.equal(normalise(crop_centre(given, image, size), image), transform(given))


def test_denormalised_views_equal_the_input() -> None:
    image, given = ImageConfig(), picture(40, 70)
    values = normalise(given, image)
    # Pixels are rounded down, and rounding errors must not make them one less.
    assert np.abs(np.asarray(to_picture(values + 1e-4, image)).astype(int) - np.asarray(given)).max() == 0
    mean, scale = scaled_statistics(image, torch.device("cpu"))
    pixels = torch.from_numpy(np.array(given)).permute(2, 0, 1)
    torch.testing.assert_close((pixels - mean) * scale, values)


def test_canvas_is_zero_right_of_and_below_the_image() -> None:
    values = torch.rand(3, 33, 64)
    canvas = pad_to_canvas(values)
    assert canvas.shape == (3, 64, 64)
    assert torch.equal(canvas[:, :33], values)
    assert not canvas[:, 33:].any()


@pytest.mark.parametrize("size", [(1, 7), (33, 95), (120, 90)])
def test_maps_are_resized_without_padding(size: tuple[int, int]) -> None:
    logits = torch.randn(5, 8, 24, generator=torch.Generator().manual_seed(0))
    on_canvas = interpolate(logits[None], (32, 96), mode="bilinear")[..., :31, :94]
    expected = interpolate(on_canvas, size, mode="bilinear")[0]
    assert torch.equal(resize_to_image(logits, (31, 94), size), expected)
