"""Whether a JPEG or PNG is laid out as one, and its size, in microseconds and without decoding.

DALI raises for a file whose layout it cannot follow while its threads are still at work on the batch's other images,
and the process dies of it (nvidia-dali 2.4). So a sample is looked at here before DALI sees it. A size other than
the index says, such as a decompression bomb's, is found at the same time.
"""

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # these three are tables
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD8)])


def read_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels; None for anything but a JPEG or PNG that can be followed up to its pixels."""
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg_size(data)
    return _read_png_size(data) if data.startswith(_PNG) else None


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    size, place = None, 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        length = int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker in _WITHOUT_LENGTH:
            place += 2
            continue
        end = place + 2 + length
        if marker < 0xC0 or length < 2 or end > len(data):
            return None
        if marker == _START_OF_SCAN:
            return size
        if marker in _START_OF_FRAME:
            if length < 8:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            if precision != 8 or components not in (1, 3, 4) or length != 8 + 3 * components:
                return None
            size = height, width
        place = end
    return None


def _read_png_size(data: bytes) -> tuple[int, int] | None:
    size, place = None, len(_PNG)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            return None
        if kind == b"IHDR" and length == 13:
            width, height, depth, color = struct.unpack_from(">IIBB", data, place + 8)
            if depth not in _PNG_DEPTHS.get(color, ()):
                return None
            size = height, width
        if kind == b"IEND":
            return size
        place += 12 + length
    return None
