"""Reading sizes from headers, against PIL; and what it lets through is something DALI can follow."""

import io
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import ImageConfig as ImageSettings
from pipeline.feed.augment import evaluation_views
from pipeline.feed.dali import Decoder
from pipeline.shards import images
from pipeline.shards.image_header import damage, excess, read_size
from tests.corpus import kinds, png

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
def test_header_size_matches_pil(data: bytes) -> None:
    assert read_size(data) == SIZE
    assert Image.open(io.BytesIO(data)).size == SIZE[::-1]


@pytest.mark.parametrize("format", ["GIF", "BMP", "WEBP", "TIFF"])
def test_unsupported_formats_have_no_size(format: str) -> None:
    buffer = io.BytesIO()
    picture("RGB").save(buffer, format)
    assert read_size(buffer.getvalue()) is None


def scans(data: bytes, count: int, before: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes `count` times, each behind `before`."""
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:start] + (before + data[start:end]) * count + data[end:]


def chunks(kind: bytes, count: int) -> bytes:
    data = png(np.zeros((*SIZE, 1), int), 0)
    chunk = struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))
    return data[:33] + chunk * count + data[33:]


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    picture("RGB").save(buffer, "JPEG", **options)
    return buffer.getvalue()


PLAIN, PROGRESSIVE = jpeg(), jpeg(progressive=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (scans(PROGRESSIVE, 300), "more than 100 scans"),
        (scans(PROGRESSIVE, 300, b"junk"), "more than 100 scans"),
        (scans(PROGRESSIVE, 300, b"\xff\xfe\0\4\xff\xd9"), "more than 100 scans"),
        (PLAIN[:2] + b"\xff" * 1_000_000 + PLAIN[2:], "more than 65,536 bytes between segments"),
        (PLAIN[:2] + b"\xff\xd0" * 500_000 + PLAIN[2:], "more than 65,536 bytes between segments"),
        (PLAIN[:3] + b"\xff" * 1_000_000, "more than 65,536 bytes between segments"),
        (PLAIN[:2] + b"\xff\xe5\0\2" * 200_000 + PLAIN[2:], "more than 131,072 segments"),
        (chunks(b"prIv", 200_000), "more than 131,072 chunks"),
        (chunks(b"IDAT", 200_000), "more than 131,072 chunks"),
    ],
    ids=range(9),
)
def test_images_with_excessive_scans_or_segments_are_rejected(data: bytes, reason: str) -> None:
    started = time.process_time()
    assert read_size(data) is None
    for look in (images.check, images.header, lambda data: images.prepare(data, quality=90)):
        with pytest.raises(images.BadImageError, match=f"^{reason}, as no encoder writes"):
            look(data)
    assert time.process_time() - started < 10


def test_ordinary_images_are_not_excessive() -> None:
    assert not [kind.name for kind in kinds() if excess(kind.data)]
    assert excess(scans(PROGRESSIVE, 90)) is None
    assert excess(jpeg(icc_profile=b"\xff\xda" * 40_000)) is None
    assert excess(PLAIN + b"\xff\xda" * 1000) is None, "behind the only scan"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from([PLAIN, PROGRESSIVE, png(np.zeros((5, 7, 3), int), 2)]), st.data())
def test_arbitrary_bytes_are_parsed_without_error(whole: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(spoilt)))
        spoilt[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=12))
    found = read_size(bytes(spoilt))
    assert found is None or all(0 <= side < 1 << 32 for side in found)
    assert isinstance(damage(bytes(spoilt)), str | None)
    assert isinstance(excess(bytes(spoilt)), str | None)


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
def test_dali_survives_damaged_images_whose_size_is_readable(
    damage: Callable[[bytearray, np.random.Generator], None],
) -> None:
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
