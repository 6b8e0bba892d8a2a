"""A folder of damaged images and shards, each damaged in one known way, among good ones.

    build(folder, seed) ──▶ folder/images/CLASS/*.jpg|png …   good and damaged files
                            folder/shards/*.tar               good and damaged shards, of a few samples each
                        ──▶ Damage: what was done to what, and what is still good

100 images and 100 shards are damaged. A bit that is flipped in an image counts as damage where PIL refuses the result.
"""

import dataclasses
import functools
import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("china", "flower")
NUM_DAMAGED_IMAGES = 100
NUM_DAMAGED_SHARDS = 100
NUM_GOOD_IMAGES = 60
NUM_GOOD_SHARDS = 5
SAMPLES_PER_SHARD = 4


@dataclasses.dataclass
class Damage:
    images: Path
    shards: Path
    image_damage: dict[str, str]
    """What was done to each damaged image, by its path."""
    good_images: set[str]
    """Keys of the others, as packing names them."""
    shard_damage: dict[str, str]
    """What was done to each damaged shard, by its name."""
    bad_keys: dict[str, set[str | None]]
    """Of each damaged shard the keys that must be reported; None stands for the whole file."""
    hidden_keys: set[str]
    """Samples whose damage only decoding can find."""
    good_keys: set[str]
    """All other samples that can still be read."""


def build(folder: Path, seed: int = 0) -> Damage:
    rng = np.random.default_rng(seed)
    damage = Damage(folder / "images", folder / "shards", {}, set(), {}, {}, set(), set())
    _build_images(damage, rng)
    _build_shards(damage, rng)
    return damage


@functools.cache
def _photos() -> list[np.ndarray]:
    return load_sample_images().images


def picture(rng: np.random.Generator, label: int, format: str = "JPEG") -> bytes:
    """A random window of one of scikit-learn's photographs, encoded."""
    photo = _photos()[label]
    height, width = rng.integers(36, 64, 2)
    y, x = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
    buffer = BytesIO()
    Image.fromarray(photo[y : y + height, x : x + width]).save(buffer, format)
    return buffer.getvalue()


def decodes(data: bytes) -> bool:
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
    except Exception:  # whatever a decoder raises
        return False
    return True


# Images


def truncated(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: rng.integers(1, len(data) * 9 // 10)]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    damaged = bytearray(data)
    while decodes(bytes(damaged)):
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    return bytes(damaged)


def flipped_behind_header(rng: np.random.Generator, data: bytes) -> bytes:
    """A PNG whose header is whole and whose pixels are not."""
    damaged = bytearray(_png(data))
    while decodes(bytes(damaged)):
        damaged[rng.integers(60, len(damaged) - 20)] ^= 1 << rng.integers(8)
    return bytes(damaged)


def overwritten(rng: np.random.Generator, data: bytes) -> bytes:
    """Lost blocks, as a disk leaves them; the header among them."""
    return bytes(512) + data[512:]


def empty(rng: np.random.Generator, data: bytes) -> bytes:
    return b""


def noise(rng: np.random.Generator, data: bytes) -> bytes:
    return rng.bytes(len(data))


def text(rng: np.random.Generator, data: bytes) -> bytes:
    return b"<!DOCTYPE html><title>404 Not Found</title>"


def postscript(rng: np.random.Generator, data: bytes) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def other_format(rng: np.random.Generator, data: bytes) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(data)).save(buffer, str(rng.choice(["GIF", "BMP", "WEBP", "TIFF", "PPM"])))
    return buffer.getvalue()


def png_bomb(rng: np.random.Generator, data: bytes) -> bytes:
    """A tiny file that claims 10 to 4,000 million pixels."""
    side = int(rng.integers(11_600, 65_000))
    return _png_of(side, side, zlib.compress(bytes(1000)))


def jpeg_bomb(rng: np.random.Generator, data: bytes) -> bytes:
    bomb = bytearray(data)
    start = bomb.index(b"\xff\xc0") + 5
    bomb[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(bomb)


def bmp_bomb(rng: np.random.Generator, data: bytes) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)


def no_pixels(rng: np.random.Generator, data: bytes) -> bytes:
    return _png_of(0, 0, zlib.compress(b""))


DECODER_BEWARE = (png_bomb, jpeg_bomb, bmp_bomb)
IMAGE_DAMAGE = (
    *DECODER_BEWARE,
    *(truncated, flipped, flipped_behind_header, overwritten),
    *(empty, noise, text, postscript, other_format, no_pixels),
)


def _png(data: bytes) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


def _png_of(width: int, height: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _build_images(damage: Damage, rng: np.random.Generator) -> None:
    for number in range(NUM_GOOD_IMAGES + NUM_DAMAGED_IMAGES):
        label = number % 2
        suffix, format = (("jpg", "JPEG"), ("png", "PNG"))[number // 2 % 2]
        path = damage.images / CLASSES[label] / f"{number:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = picture(rng, label, format)
        if number < NUM_GOOD_IMAGES:
            damage.good_images.add(f"{CLASSES[label]}/{number:04d}")
            path.write_bytes(data)
        elif (kind := number % (len(IMAGE_DAMAGE) + 1)) == len(IMAGE_DAMAGE):
            path.symlink_to("nowhere")
            damage.image_damage[str(path)] = "dangling link"
        else:
            spoil = IMAGE_DAMAGE[kind]
            data = spoil(rng, picture(rng, label) if spoil is jpeg_bomb else data)
            assert spoil in (*DECODER_BEWARE, other_format) or not decodes(data), spoil
            path.write_bytes(data)
            damage.image_damage[str(path)] = spoil.__name__


# Shards


@dataclasses.dataclass
class Sample:
    key: str
    label: int
    image: bytes

    @property
    def members(self) -> list["Member"]:
        return [Member(f"{self.key}.jpg", self.image), Member(f"{self.key}.cls", str(self.label).encode())]


@dataclasses.dataclass
class Member:
    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    pax: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Spoiled:
    """A damaged shard: its bytes, the keys that must be reported (None: the file), and keys that are gone."""

    data: bytes
    bad: set[str | None]
    lost: set[str] = dataclasses.field(default_factory=set)
    hidden: set[str] = dataclasses.field(default_factory=set)
    suffix: str = ".tar"


def tar_of(members: list[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.size = member.type, member.link, len(member.data)
            info.pax_headers = member.pax
            tar.addfile(info, BytesIO(member.data))
    return buffer.getvalue()


def whole(samples: list[Sample]) -> bytes:
    return tar_of([member for sample in samples for member in sample.members])


def with_header(data: bytes, start: int, **fields: bytes) -> bytes:
    """A tar whose header at `start` has other fields, and the checksum that goes with them."""
    places = {"name": 0, "size": 124, "type": 156, "magic": 257}
    header = bytearray(data[start : start + 512])
    for name, value in fields.items():
        header[places[name] : places[name] + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def starts(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        return {member.name: member.offset for member in tar}


Spoil = Callable[[np.random.Generator, list[Sample]], Spoiled]
SHARD_DAMAGE: list[Spoil] = []


def spoils(function: Spoil) -> Spoil:
    SHARD_DAMAGE.append(function)
    return function


def keys(samples: list[Sample]) -> set[str]:
    return {sample.key for sample in samples}


@spoils
def cut_in_an_image(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    start = starts(data)[f"{samples[2].key}.jpg"]
    return Spoiled(data[: start + 512 + 100], {None, samples[2].key}, lost={samples[3].key})


@spoils
def cut_in_a_header(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    return Spoiled(data[: starts(data)[f"{samples[2].key}.cls"] + 300], {None, samples[2].key}, lost={samples[3].key})


@spoils
def cut_between_samples(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    return Spoiled(data[: starts(data)[f"{samples[2].key}.jpg"]], {None}, lost=keys(samples[2:]))


@spoils
def flipped_in_a_header(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = bytearray(whole(samples))
    data[starts(bytes(data))[f"{samples[1].key}.jpg"] + int(rng.integers(0, 148))] ^= 1 << int(rng.integers(8))
    return Spoiled(bytes(data), {None}, lost=keys(samples[1:]))


@spoils
def lost_block(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    """A header of zeros looks like the end of the tar."""
    data = whole(samples)
    start = starts(data)[f"{samples[1].key}.jpg"]
    return Spoiled(data[:start] + bytes(512) + data[start + 512 :], {None}, lost=keys(samples[1:]))


@spoils
def joined(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    return Spoiled(whole(samples[:2]) + whole(samples[2:]), {None}, lost=keys(samples[2:]))


@spoils
def negative_size(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    """Python's tarfile goes round in circles on this one (CVE-2025-8194)."""
    data = whole(samples)
    size = (-1024).to_bytes(12, "big", signed=True)
    spoiled = with_header(data, starts(data)[f"{samples[1].key}.jpg"], size=size)
    return Spoiled(spoiled, {None}, lost=keys(samples[1:]))


@spoils
def huge_size(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    spoiled = with_header(data, starts(data)[f"{samples[1].key}.jpg"], size=b"77777777777\0")
    return Spoiled(spoiled, {None, samples[1].key}, lost=keys(samples[2:]))


@spoils
def huge_pax_header(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    start = starts(data)[f"{samples[1].key}.jpg"]
    spoiled = with_header(data, start, type=tarfile.XHDTYPE, size=b"77777777777\0")
    return Spoiled(spoiled, {None}, lost=keys(samples[1:]))


@spoils
def broken_pax_header(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    data = whole(samples)
    spoiled = with_header(data, starts(data)[f"{samples[1].key}.jpg"], type=tarfile.XHDTYPE)
    return Spoiled(spoiled, {None}, lost=keys(samples[1:]))


@spoils
def compressed(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    ways = [(gzip.compress, ".tar.gz"), (lzma.compress, ".tar.xz"), (gzip.compress, ".tar")]
    compress, suffix = ways[rng.integers(3)]
    return Spoiled(compress(whole(samples)), {None}, lost=keys(samples), suffix=suffix)


@spoils
def no_tar(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    return Spoiled([b"", rng.bytes(5000), samples[0].image, b"hello"][rng.integers(4)], {None}, lost=keys(samples))


@spoils
def no_members(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    return Spoiled(tar_of([]), {None}, lost=keys(samples))


@spoils
def bad_image(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    spoil = [empty, noise, text, postscript, other_format, png_bomb, jpeg_bomb, bmp_bomb, overwritten, no_pixels][
        rng.integers(10)
    ]
    samples[1].image = spoil(rng, samples[1].image)
    return Spoiled(whole(samples), {samples[1].key})


@spoils
def bad_pixels(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    """Nothing that an index can see without decoding."""
    samples[1].image = flipped_behind_header(rng, samples[1].image)
    image = samples[2].image
    samples[2].image = image[:-50]
    assert not decodes(samples[2].image)
    hidden = {samples[1].key, samples[2].key}
    return Spoiled(whole(samples), {*hidden}, hidden=hidden)


@spoils
def repeated_key(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    again = [samples[1], samples[0]][rng.integers(2)]
    return Spoiled(whole([*samples[:2], again, *samples[2:]]), {again.key}, lost=set())


@spoils
def parts_apart(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    (image, label), rest = samples[1].members, [member for sample in samples[2:] for member in sample.members]
    return Spoiled(tar_of([*samples[0].members, image, *rest, label]), {samples[1].key})


@spoils
def missing_part(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    members = [member for sample in samples for member in sample.members]
    del members[2 + rng.integers(2)]
    return Spoiled(tar_of(members), {samples[1].key})


@spoils
def two_images(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    extra = Member(f"{samples[0].key}.PNG", samples[0].image)
    members = [member for sample in samples for member in sample.members]
    return Spoiled(tar_of([extra, *members]), {samples[0].key})


@spoils
def bad_label(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    label = [b"", b"\xff\xfe", b"cat", b"-1", b"1.5", b"999999999999", b"nan", bytes(3)][rng.integers(8)]
    image, _ = samples[1].members
    members = [*samples[0].members, image, Member(f"{samples[1].key}.cls", label)]
    return Spoiled(
        tar_of(members) if not samples[2:] else tar_of([*members, *samples[2].members, *samples[3].members]),
        {samples[1].key},
    )


@spoils
def traversal(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    key = ["../../evil", "/etc/evil", "china/../../evil", "china/../evil"][rng.integers(4)]
    samples[1].key = key
    return Spoiled(whole(samples), {key})


@spoils
def stray_traversal(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    """Of a member that is no part of any sample."""
    name = ["../../.bashrc", "/etc/passwd", ".."][rng.integers(3)]
    return Spoiled(tar_of([*samples[0].members, Member(name, b"evil"), *samples[1].members]), {name}, keys(samples[2:]))


def replaced(samples: list[Sample], type: bytes, link: str = "") -> Spoiled:
    """The image of the second sample is a member of another type."""
    image, label = samples[1].members
    image = Member(image.name, type=type, link=link)
    rest = [member for sample in samples[2:] for member in sample.members]
    return Spoiled(tar_of([*samples[0].members, image, label, *rest]), {samples[1].key})


@spoils
def link(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    type = [tarfile.SYMTYPE, tarfile.LNKTYPE][rng.integers(2)]
    return replaced(samples, type, ["/etc/passwd", f"{samples[0].key}.jpg"][rng.integers(2)])


@spoils
def device(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    return replaced(samples, [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE][rng.integers(3)])


@spoils
def sparse(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    image, label = samples[1].members
    if rng.integers(2):
        image = dataclasses.replace(image, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    rest = [member for sample in samples[2:] for member in sample.members]
    data = tar_of([*samples[0].members, image, label, *rest])
    if not image.pax:
        data = with_header(data, starts(data)[image.name], type=tarfile.GNUTYPE_SPARSE, magic=b"ustar  \0")
    return Spoiled(data, {samples[1].key})


@spoils
def unreadable_name(rng: np.random.Generator, samples: list[Sample]) -> Spoiled:
    """A NUL, which only a PAX header can hold."""
    image, label = samples[1].members
    key = f"{samples[1].key}\0"
    image = Member("a", image.data, pax={"path": f"{key}.jpg"})
    label = Member("b", label.data, pax={"path": f"{key}.cls"})
    return Spoiled(tar_of([*samples[0].members, image, label]), {key}, lost=keys(samples[1:]))


def _build_shards(damage: Damage, rng: np.random.Generator) -> None:
    damage.shards.mkdir(parents=True)
    for number in range(NUM_GOOD_SHARDS + NUM_DAMAGED_SHARDS):
        samples = [
            Sample(f"{CLASSES[row % 2]}/{number:03d}-{row}", row % 2, picture(rng, row % 2))
            for row in range(SAMPLES_PER_SHARD)
        ]
        if number < NUM_GOOD_SHARDS:
            (damage.shards / f"{number:03d}.tar").write_bytes(whole(samples))
            damage.good_keys |= keys(samples)
            continue
        spoil = SHARD_DAMAGE[number % len(SHARD_DAMAGE)]
        all_keys = keys(samples)
        spoiled = spoil(rng, samples)
        name = f"{number:03d}{spoiled.suffix}"
        (damage.shards / name).write_bytes(spoiled.data)
        damage.shard_damage[name] = spoil.__name__
        damage.bad_keys[name] = spoiled.bad
        damage.hidden_keys |= spoiled.hidden
        bad = spoiled.bad - all_keys if spoil is repeated_key else spoiled.bad
        damage.good_keys |= (all_keys & keys(samples)) - bad - spoiled.lost - spoiled.hidden
