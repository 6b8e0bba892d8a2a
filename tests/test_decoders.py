"""What packing and indexing take is fed as Pillow decodes it, and what they refuse is named with the remedy."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.shards import images
from pipeline.shards.images import BadImageError
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.shards.index_tars import index_tars
from pipeline.shards.verify import verify
from tests import corpus
from tests.corpus import Kind
from tests.decoders import TOLERANCE, Result, damaged, difference, feed, is_right, try_all, write_tar
from tests.ranks import ROOT

BAD_HEADERS = {"JPEG lossless", "JPEG lossless, grey", "JPEG CMYK, no marker", "JPEG CMYK, JFIF"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return try_all(tmp_path_factory.mktemp("kinds"))


def dark_kinds() -> list[Kind]:
    return [kind for kind in corpus.kinds() if kind.is_dark]


# Kinds


def test_each_image_kind_matches_pillow_or_is_rejected_with_remedy(results: list[Result]) -> None:
    assert len(results) > 130
    assert [result for result in results if not is_right(result)] == []


def test_only_known_bad_image_kinds_are_rejected(results: list[Result]) -> None:
    refused = BAD_HEADERS | {kind.name for kind in dark_kinds()}
    assert {result.kind.name for result in results if result.packed} == refused
    assert {result.kind.name for result in results if result.indexed} == refused


def test_verify_reports_bad_image_kinds_in_unchecked_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {f"{number:03d}": kind for number, kind in enumerate(corpus.kinds())}
    write_tar(tmp_path / "all.tar", kinds)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_is_plain", lambda image, data: True)
        index_tars(str(tmp_path), labels="cls", decode=False)
    reasons = {kinds[str(fault.key)].name: fault.reason for fault in verify(tmp_path, deep=True)}
    assert reasons.keys() == BAD_HEADERS | {kind.name for kind in dark_kinds()}
    for name, reason in reasons.items():
        assert ("pack --quality" if name in BAD_HEADERS else "pack with --bits-stored") in reason
    shards, skipped = ShardSet(tmp_path), set()
    for row in range(len(shards)):
        try:
            shards.read(0, row)
        except CorruptSampleError:
            skipped.add(kinds[shards.key(0, row)].name)
    assert skipped == BAD_HEADERS


@pytest.mark.parametrize(
    "kind", [kind for kind in corpus.kinds() if kind.name in BAD_HEADERS], ids=lambda kind: kind.name
)
def test_quality_converts_image_kind_that_dali_cannot_decode(kind: Kind) -> None:
    with pytest.raises(BadImageError, match="pack with --quality"):
        images.prepare(kind.data)
    data, head = images.prepare(kind.data, quality=95)
    assert head.extension == "jpg"
    assert np.abs(feed(data, (head.height, head.width)) - kind.pixels()).mean() < 4  # chroma is subsampled


# Values of more than 8 bits


@pytest.mark.parametrize("kind", dark_kinds(), ids=lambda kind: kind.name)
def test_bits_stored_scales_dark_16_bit_images(kind: Kind) -> None:
    with pytest.raises(BadImageError, match=f"pack with --bits-stored {kind.bits_stored} "):
        images.prepare(kind.data, quality=95)
    for bits in (kind.bits_stored, 16):
        data, head = images.prepare(kind.data, bits_stored=bits)
        assert head.extension == "png"
        assert images.check(data) == head
        assert difference(data, kind.pixels(bits)) <= TOLERANCE


def test_bits_stored_leaves_other_images_unchanged() -> None:
    for data in (corpus.jpeg(corpus.picture(3)), corpus.png(corpus.picture(1, 2), corpus.GREY, 2)):
        assert images.prepare(data, bits_stored=12)[0] == data


def test_values_beyond_bits_stored_are_rejected() -> None:
    data = corpus.png(corpus.picture(1, 12), corpus.GREY, 16)
    with pytest.raises(BadImageError, match="a 16-bit value of 4,095: --bits-stored 10 says that they end at 1,023"):
        images.prepare(data, bits_stored=10)


def test_16_bit_tiffs_are_scaled_or_rejected() -> None:
    grey, colour = (corpus.picture(channels, 12).astype(np.uint16) for channels in (1, 3))
    buffer = BytesIO()
    Image.fromarray(grey[..., 0]).save(buffer, "TIFF")
    with pytest.raises(BadImageError, match="its 16-bit values end at 4,095"):
        images.prepare(buffer.getvalue(), quality=95)
    data, head = images.prepare(buffer.getvalue(), quality=95, bits_stored=12)
    assert np.abs(feed(data, (head.height, head.width)) - grey * (255 / 4095)).mean() < 2
    buffer = BytesIO()
    tifffile.imwrite(buffer, colour, photometric="rgb")
    with pytest.raises(BadImageError, match="16 bits a colour, of which PIL reads the upper half: convert it to PNG"):
        images.prepare(buffer.getvalue(), quality=95)


# Damage


def without_scan(data: bytes, number: int) -> bytes:
    """Returns a JPEG without the scan of this number, and without the tables that stand in front of it."""
    starts = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
    return data[: starts[number]] + data[[*starts, len(data) - 2][number + 1] :]


PROGRESSIVE = corpus.jpeg(corpus.picture(3), progressive=True)
SCAN_EACH = next(kind.data for kind in corpus.kinds() if kind.name == "JPEG a scan for each component")


@pytest.mark.parametrize(
    ("data", "number"), [*((PROGRESSIVE, n) for n in range(10)), *((SCAN_EACH, n) for n in range(3))]
)
def test_missing_jpeg_scan_is_detected(data: bytes, number: int) -> None:
    images.check(data)
    with pytest.raises(BadImageError, match=r"damaged: scans are missing|not a readable image"):
        images.check(without_scan(data, number))
    with pytest.raises(BadImageError, match=r"damaged: scans are missing|not a readable image"):
        images.prepare(without_scan(data, number), quality=90)


def test_decoders_tolerate_missing_jpeg_scan() -> None:
    data = without_scan(PROGRESSIVE, 9)
    assert difference(data, Kind("", data).pixels()) <= TOLERANCE
    assert difference(data, Kind("", PROGRESSIVE).pixels()) > TOLERANCE


@pytest.mark.parametrize("missing", [b"PLTE", b""])
def test_png_that_only_libpng_rejects_is_detected(missing: bytes, tmp_path: Path) -> None:
    palette = (b"PLTE", bytes(range(48)))
    data = bytearray(corpus.png(corpus.picture(1, 4), corpus.PALETTE, 8, *([palette] if not missing else [])))
    if not missing:
        data[data.index(b"IEND") - 5] ^= 1  # in the checksum of the pixels
    Image.open(BytesIO(data)).load()
    with pytest.raises(RuntimeError):
        feed(bytes(data), (corpus.HEIGHT, corpus.WIDTH))
    with pytest.raises(BadImageError, match="damaged: its chunks"):
        images.check(bytes(data))


def test_damaged_images_are_rejected_or_match_pillow() -> None:
    fates = damaged(3)
    assert {fate for _, _, fate in fates} == {"refused", "as Pillow"}
    assert all(fate == "refused" for way, _, fate in fates if way == "cut off")


def test_index_detects_damage_behind_headers_unless_no_decode(tmp_path: Path) -> None:
    whole = corpus.jpeg(corpus.picture(3))
    samples = {"cut": whole[:-200], "scan": without_scan(PROGRESSIVE, 9), "whole": whole}
    write_tar(tmp_path / "a.tar", {key: Kind(key, data) for key, data in samples.items()})
    command = [sys.executable, ROOT / "launch/shards.py", "index", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1
    faults = json.loads(process.stdout)["faults"]
    assert {fault["key"] for fault in faults} == {"cut", "scan"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar"}
    process = subprocess.run([*command, "--no-decode"], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0
    assert json.loads(process.stdout)["samples"] == 3
    assert {fault.key for fault in verify(tmp_path, deep=True)} == {"cut", "scan"}
