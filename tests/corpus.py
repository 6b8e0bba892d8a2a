"""Pictures of every kind that a JPEG or PNG can be, made by code: Pillow's JPEGs, with their bytes changed where Pillow
cannot write a kind, and PNGs written chunk by chunk.
"""

import base64
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Array = npt.NDArray[Any]

HEIGHT, WIDTH = 45, 61  # no multiples of a JPEG's blocks
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # a PNG's colour types
_CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_ROTATED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: turn by 90 degrees to show

# Made with jpegtran of libjpeg-turbo 2.1.5, as Pillow writes neither: jpegtran -arithmetic [-progressive], and
# jpegtran -scans with each component in a scan of its own.
_ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYV"
    "pQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAQ"
    "ABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDRvKXOzBaI9lpCSdzmPLX9DJyz1cDukjgpFEZFF8lx6RccSmj5JQxK9b7mvQ"
    "uvRWUkEI/FD70OzTlWLDGM9UBT0w2sQHI7LzXQgP/Z"
)
_ARITHMETIC_PROGRESSIVE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYV"
    "pQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//ygARCAAQ"
    "ABgDASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAdCDe8ootKddUzD/zAAEEAX/2gAIAQEAAQUCSuumoUV/IjCI+2S89UD/zAAEEQX/2g"
    "AIAQMBAT8BjiMSeOhg/8wABBEF/9oACAECAQE/ASeAQgx8EtSA/8wABBAF/9oACAEBAAY/ApVPQP/MAAQQBf/aAAgBAQABPyH68Pebb657icD/"
    "2gAMAwEAAgADAAAAEGDw/8wABBEF/9oACAEDAQE/EE6rvv/MAAQRBf/aAAgBAgEBPxAfyS6zVv/MAAQQBf/aAAgBAQABPxCemZHug5bQ22ffil"
    "D8yhn/2Q=="
)
_SCAN_EACH = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYV"
    "pQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAARCAAQ"
    "ABgDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAABgX/xAAeEAABBAIDAQAAAAAAAAAAAAARAAIDBAEFEhMhFP/aAAgBAQAAPwCla2TJ63"
    "VjOCEZdrJM2u0ZBKS0tgytX6nZ9CJUJpXXuLiCnTIIfg5eEIPtJpWXeLCCv//EABQBAQAAAAAAAAAAAAAAAAAAAAH/xAAbEQACAwADAAAAAAAA"
    "AAAAAAABAgAEFBMxQf/aAAgBAhEAPwBZM66B2YpVFscrez//xAAUAQEAAAAAAAAAAAAAAAAAAAAB/8QAGxEAAgEFAAAAAAAAAAAAAAAAAAEUAh"
    "ITIkH/2gAIAQMRAD8AMm0bg1KM7Ef/2Q=="
)


class Kind(NamedTuple):
    name: str
    data: bytes
    values: Array | None = None
    """Of more than 8 bits: what red, green and blue are, [height, width, 3]."""
    bits_stored: int = 16
    """Of such values: how many of a file's 16 bits they use."""

    @property
    def is_dark(self) -> bool:
        """Whether the values use a part of the file's range."""
        return self.bits_stored < 16

    def pixels(self, bits: int = 16) -> Array:
        """Returns what the feed should give, [height, width, 3] in 0 ... 255: Pillow's picture, or `values` scaled from
        the range of so many bits."""
        if self.values is not None:
            return self.values * 255 / (2**bits - 1)
        with warnings.catch_warnings(), Image.open(BytesIO(self.data)) as image:
            warnings.simplefilter("ignore")  # of transparency that is dropped
            return np.asarray(image.convert("RGB")).astype(np.float64)


def kinds() -> Iterator[Kind]:
    """Yields every kind once."""
    yield from _jpegs()
    yield from _four_channels()
    yield from _pngs()
    yield from _deep_pngs()


def picture(channels: int, depth: int = 8, height: int = HEIGHT, width: int = WIDTH) -> Array:
    """Returns waves of another length in each channel, [height, width, channels], over all values of `depth` bits."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + 3 * channel) / (5 + 2 * channel)) * np.cos(y / (7 + channel)) for channel in range(channels)]
    return np.rint((np.stack(waves, -1) + 1) / 2 * (2**depth - 1)).astype(np.int64)


def jpeg(values: Array, mode: str = "RGB", **options: Any) -> bytes:
    """Returns `values`, [height, width, channels], as Pillow encodes them."""
    buffer = BytesIO()
    values = values.astype(np.uint8)
    Image.fromarray(values[..., 0] if mode == "L" else values, mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment of a JPEG up to its first scan's pixels."""
    place = 2
    while data[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        yield data[place + 1], place, end
        place = end
    yield 0xDA, place, place + 2 + int.from_bytes(data[place + 2 : place + 4])


def without(data: bytes, *markers: int) -> bytes:
    """Returns a JPEG without the segments of these markers."""
    for marker, start, end in reversed(list(segments(data))):
        if marker in markers:
            data = data[:start] + data[end:]
    return data


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """Returns a JPEG with one segment more, in front."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def adobe(data: bytes, transform: int) -> bytes:
    """Returns a JPEG whose Adobe marker alone says which colour model it has."""
    return with_segment(without(data, 0xE0, 0xEE), 0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def with_frame(data: bytes, marker: int | None = None, ids: bytes = b"", sampling: bytes = b"") -> bytes:
    """Returns a JPEG with another start of frame: its marker, its components' names, their sampling factors."""
    changed = bytearray(data)
    for kind, start, _ in segments(data):
        if 0xC0 <= kind <= 0xC2:
            changed[start + 1] = marker or kind
            changed[start + 10 : start + 10 + 3 * len(ids) : 3] = ids
            changed[start + 11 : start + 11 + 3 * len(sampling) : 3] = sampling
        if kind == 0xDA:
            changed[start + 5 : start + 5 + 2 * len(ids) : 2] = ids
    return bytes(changed)


def _jpegs() -> Iterator[Kind]:
    colour = picture(3)
    plain, rgb, grey = jpeg(colour), jpeg(colour, keep_rgb=True), jpeg(picture(1), "L")
    yield Kind("JPEG grey", grey)
    yield Kind("JPEG grey, Adobe", adobe(grey, 0))
    yield Kind("JPEG grey, no marker", without(grey, 0xE0))
    yield Kind("JPEG grey, sampling 2x2", with_frame(grey, sampling=b"\x22"))
    yield Kind("JPEG YCbCr, JFIF", plain)
    yield Kind("JPEG YCbCr, Adobe", adobe(plain, 1))
    yield Kind("JPEG YCbCr, JFIF and Adobe RGB", with_segment(adobe(plain, 0), 0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"))
    yield Kind("JPEG YCbCr, Adobe YCCK", adobe(plain, 2))
    yield Kind("JPEG YCbCr, no marker", without(plain, 0xE0))
    yield Kind("JPEG YCbCr, components 0 1 2", without(with_frame(plain, ids=b"\0\1\2"), 0xE0))
    yield Kind("JPEG YCbCr, components Y C c", without(with_frame(plain, ids=b"YCc"), 0xE0))
    yield Kind("JPEG RGB, Adobe", adobe(rgb, 0))
    yield Kind("JPEG RGB, Adobe, components 1 2 3", adobe(with_frame(rgb, ids=b"\1\2\3"), 0))
    yield Kind("JPEG RGB, components R G B", without(with_frame(rgb, ids=b"RGB"), 0xEE))
    yield Kind("JPEG RGB, no marker", without(with_frame(rgb, ids=b"\1\2\3"), 0xEE))
    yield Kind("JPEG RGB, JFIF, components R G B", with_segment(without(rgb, 0xEE), 0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"))
    square = picture(3, height=64, width=64)
    half, quarter = (jpeg(square, subsampling=number) for number in (1, 2))
    for number, name in enumerate(("4:4:4", "4:2:2", "4:2:0")):
        yield Kind(f"JPEG {name}", jpeg(colour, subsampling=number))
    # As many blocks of each component in the same order, so the pixels are others, but whole.
    yield Kind("JPEG 4:4:0", with_frame(half, sampling=b"\x12\x11\x11"))
    yield Kind("JPEG 4:1:1", with_frame(quarter, sampling=b"\x41\x11\x11"))
    yield Kind(
        "JPEG luma smaller than chroma",
        with_frame(with_frame(jpeg(square, subsampling=1), ids=b"\2\1\3"), sampling=b"\x21\x11\x11"),
    )
    yield Kind("JPEG progressive", jpeg(colour, progressive=True))
    yield Kind("JPEG progressive, grey", jpeg(picture(1), "L", progressive=True))
    yield Kind("JPEG extended sequential", with_frame(plain, marker=0xC1))
    yield Kind("JPEG a scan for each component", base64.b64decode(_SCAN_EACH))
    yield Kind("JPEG arithmetic coding", base64.b64decode(_ARITHMETIC))
    yield Kind("JPEG arithmetic coding, progressive", base64.b64decode(_ARITHMETIC_PROGRESSIVE))
    yield Kind("JPEG lossless", lossless(colour))
    yield Kind("JPEG lossless, grey", lossless(picture(1)))
    yield Kind("JPEG restart intervals of 1 block", jpeg(colour, restart_marker_blocks=1))
    yield Kind("JPEG restart intervals of 1 row", jpeg(colour, restart_marker_rows=1))
    yield Kind("JPEG progressive, restart intervals", jpeg(colour, restart_marker_rows=1, progressive=True))
    yield Kind("JPEG optimised tables", jpeg(colour, optimize=True))
    yield Kind("JPEG quality 1", jpeg(colour, quality=1))
    yield Kind("JPEG quality 100", jpeg(colour, quality=100))
    yield Kind("JPEG orientation", jpeg(colour, exif=b"Exif\0\0" + _ROTATED))
    yield Kind("JPEG profile", jpeg(colour, icc_profile=_profile()))
    yield Kind("JPEG comment with a frame", jpeg(colour, comment=b"\xff\xc0\0\x11"))
    yield Kind("JPEG several pictures", _multi_picture(colour))
    yield Kind("JPEG with bytes behind", plain + b"\xff\xd8 more")
    for height, width in ((1, 1), (1, 61), (45, 1), (2, 2), (7, 9), (17, 16)):
        for number in (0, 2):
            yield Kind(
                f"JPEG {width} x {height}, subsampling {number}", jpeg(picture(3, 8, height, width), subsampling=number)
            )


def _four_channels() -> Iterator[Kind]:
    cmyk = jpeg(picture(4), "CMYK")
    yield Kind("JPEG CMYK, Adobe", cmyk)
    yield Kind("JPEG CMYK, no marker", without(cmyk, 0xEE))
    yield Kind("JPEG CMYK, JFIF", with_segment(without(cmyk, 0xEE), 0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"))
    yield Kind("JPEG CMYK, Adobe, progressive", jpeg(picture(4), "CMYK", progressive=True))
    yield Kind("JPEG YCCK, Adobe", adobe(cmyk, 2))
    yield Kind("JPEG YCCK, Adobe, 4:2:0", adobe(jpeg(picture(4), "CMYK", subsampling=2), 2))
    yield Kind("JPEG CMYK, Adobe YCbCr", adobe(cmyk, 1))


def lossless(values: Array) -> bytes:
    """Returns `values`, [height, width, channels] of 8 bits, as a lossless JPEG (ITU-T T.81, annex H)."""
    height, width, channels = values.shape
    components = b"".join(bytes([number, 0x11, 0]) for number in range(1, channels + 1))
    data = b"\xff\xd9"
    scan = bytes([channels]) + b"".join(bytes([number, 0]) for number in range(1, channels + 1)) + b"\1\0\0"
    predicted = np.concatenate([np.full((1, 1, channels), 128), values[:-1, :1]])
    differences = np.diff(np.concatenate([predicted, values], axis=1), axis=1)
    bits = "".join(map(_coded, differences.ravel().tolist()))
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    data = b"\xff\xd8" + body + data
    for marker, content in (
        (0xDA, scan),
        (0xC4, bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])),  # nine codes of four bits
        (0xC3, struct.pack(">BHHB", 8, height, width, channels) + components),
    ):
        data = with_segment(data, marker, content)
    return data


def _coded(difference: int) -> str:
    size = abs(difference).bit_length()
    value = difference if difference > 0 else difference + (1 << size) - 1
    return f"{size:04b}" + (f"{value:0{size}b}" if size else "")


def _multi_picture(values: Array) -> bytes:
    buffer, image = BytesIO(), Image.fromarray(values.astype(np.uint8))
    image.save(buffer, "MPO", save_all=True, append_images=[image])
    return buffer.getvalue()


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def png(values: Array, color: int, depth: int = 8, *extra: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """Returns `values`, [height, width, channels], as a PNG of this colour type, with chunks before its pixels."""
    height, width, _ = values.shape
    parts = [values[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [values]
    rows = b"".join(b"\0" + row for part in parts if part.size for row in _rows(part, depth))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _rows(values: Array, depth: int) -> Iterator[bytes]:
    for row in values:
        if depth == 16:
            yield row.astype(">u2").tobytes()
        else:
            bits = np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)[:, 8 - depth :]
            yield np.packbits(bits).tobytes()


def _pngs() -> Iterator[Kind]:
    for depth in (1, 2, 4, 8):
        for interlaced in (False, True):
            end = ", interlaced" * interlaced
            indices = picture(1, depth)
            yield Kind(f"PNG grey, {depth} bits{end}", png(indices, GREY, depth, interlaced=interlaced))
            yield Kind(
                f"PNG palette, {depth} bits{end}", png(indices, PALETTE, depth, _palette(depth), interlaced=interlaced)
            )
        yield Kind(f"PNG grey, {depth} bits, one value transparent", png(indices, GREY, depth, (b"tRNS", b"\0\1")))
        transparent = b"tRNS", bytes(range(0, 2**depth, 2))
        yield Kind(
            f"PNG palette, {depth} bits, transparent", png(indices, PALETTE, depth, _palette(depth), transparent)
        )
    yield Kind("PNG short palette", png(picture(1, 4), PALETTE, 8, (b"PLTE", bytes(range(48)))))
    colour = picture(3)
    for color, name in ((COLOUR, "RGB"), (GREY_ALPHA, "grey and alpha"), (COLOUR_ALPHA, "RGB and alpha")):
        values = picture(_CHANNELS[color])
        yield Kind(f"PNG {name}", png(values, color))
        yield Kind(f"PNG {name}, interlaced", png(values, color, interlaced=True))
    yield Kind(
        "PNG RGB, one colour transparent", png(colour, COLOUR, 8, (b"tRNS", struct.pack(">3H", *colour[0, 0].tolist())))
    )
    yield Kind("PNG gamma", png(colour, COLOUR, 8, (b"gAMA", struct.pack(">I", 100_000))))
    yield Kind("PNG significant bits", png(colour, COLOUR, 8, (b"sBIT", b"\5\6\5")))
    yield Kind("PNG orientation", png(colour, COLOUR, 8, (b"eXIf", _ROTATED)))
    yield Kind("PNG background", png(picture(4), COLOUR_ALPHA, 8, (b"bKGD", struct.pack(">3H", 255, 0, 0))))
    yield Kind("PNG profile", png(colour, COLOUR, 8, (b"iCCP", b"p\0\0" + zlib.compress(_profile()))))
    yield Kind("PNG suggested palette", png(colour, COLOUR, 8, _palette(8)))
    yield Kind(
        "PNG animated",
        png(
            colour,
            COLOUR,
            8,
            (b"acTL", struct.pack(">II", 1, 0)),
            (b"fcTL", struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 1, 0, 0)),
        ),
    )
    yield Kind("PNG with bytes behind", png(colour, COLOUR) + b"more")
    for height, width in ((1, 1), (1, 61), (45, 1), (2, 3)):
        for interlaced in (False, True):
            yield Kind(
                f"PNG {width} x {height}" + ", interlaced" * interlaced,
                png(picture(3, 8, height, width), COLOUR, interlaced=interlaced),
            )


def _palette(depth: int) -> tuple[bytes, bytes]:
    return b"PLTE", np.random.default_rng(depth).integers(0, 256, 3 * 2**depth, np.uint8).tobytes()


def _deep_pngs() -> Iterator[Kind]:
    for color, name in (
        (GREY, "grey"),
        (COLOUR, "RGB"),
        (GREY_ALPHA, "grey and alpha"),
        (COLOUR_ALPHA, "RGB and alpha"),
    ):
        for bits in (8, 10, 12, 14, 15, 16):
            values = picture(_CHANNELS[color], bits)
            if color in (GREY_ALPHA, COLOUR_ALPHA):
                values[..., -1] = 65535
            shown = np.repeat(values[..., :1], 3, -1) if color in (GREY, GREY_ALPHA) else values[..., :3]
            yield Kind(f"PNG {name}, {bits} of 16 bits", png(values, color, 16), shown, bits)
            if bits == 16:
                data = png(values, color, 16, interlaced=True)
                yield Kind(f"PNG {name}, 16 of 16 bits, interlaced", data, shown)
    yield Kind("PNG grey, 16 bits, all black", png(np.zeros((5, 7, 1)), GREY, 16), np.zeros((5, 7, 3)))
    transparent = b"tRNS", struct.pack(">H", 256)
    grey = np.repeat(picture(1, 16), 3, -1)
    yield Kind("PNG grey, 16 bits, one value transparent", png(picture(1, 16), GREY, 16, transparent), grey)
    yield Kind(
        "PNG 16 bits, significant bits", png(picture(3, 16), COLOUR, 16, (b"sBIT", b"\x0c\x0c\x0c")), picture(3, 16)
    )
