"""Reading sizes from headers, against PIL; and what it lets through is something DALI can follow."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import Image as ImageSettings
from pipeline.feed.augment import evaluation_views
from pipeline.feed.dali import Decoder
from pipeline.shards.header import read_size

SIZE = 37, 53


def picture(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).convert(mode)


def encoded() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"quality": 20}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "exif": exif, "comment": b"\xff\xc0 not a frame"}),
        ("JPEG", "RGB", {"subsampling": 0, "restart_marker_blocks": 2, "icc_profile": b"\xff\xda" * 40_000}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "RGBA", {"compress_level": 0}),
    ]
    images = []
    for format, mode, extra in options:
        buffer = io.BytesIO()
        picture(mode).save(buffer, format, **extra)
        images.append(buffer.getvalue())
    return images


@pytest.mark.parametrize("data", encoded(), ids=range(9))
def test_sizes_are_pils(data: bytes) -> None:
    assert read_size(data) == SIZE
    assert Image.open(io.BytesIO(data)).size == SIZE[::-1]


@pytest.mark.parametrize("format", ["GIF", "BMP", "WEBP", "TIFF"])
def test_other_formats_have_no_size(format: str) -> None:
    buffer = io.BytesIO()
    picture("RGB").save(buffer, format)
    assert read_size(buffer.getvalue()) is None


def truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(1, len(data))) :]


def sprinkle(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, min(len(data), 900), 4).tolist():
        data[place] = int(rng.integers(256))


def blank(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data)))
    data[start:] = bytes(len(data) - start)


def cut_out(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 60))]


@pytest.mark.parametrize("damage", [truncate, sprinkle, blank, cut_out])
def test_dali_can_follow_what_has_a_size(damage: Callable[[bytearray, np.random.Generator], None]) -> None:
    # One image a batch, because a layout that DALI cannot follow ends the process when there are more.
    rng, followed, failures = np.random.default_rng(1), 0, []
    for data in encoded() * 8:
        damaged = bytearray(data)
        damage(damaged, rng)
        if read_size(bytes(damaged)) != SIZE:
            continue
        followed += 1
        array, view = np.frombuffer(bytes(damaged), np.uint8), evaluation_views(ImageSettings(), 32, np.array([SIZE]))
        decoder = Decoder(
            lambda _, batch=([array], view): batch,
            batch_size=1,
            interpolation="bicubic",
            device=torch.device("cpu"),
            num_threads=1,
            prefetch=1,
            deterministic=True,
            resizes=False,
        )
        try:
            decoder.next()
        except RuntimeError as error:
            failures.append(str(error))
        finally:
            decoder.close()
    assert followed > 5
    assert all("Failed to decode sample #0" in failure for failure in failures)
