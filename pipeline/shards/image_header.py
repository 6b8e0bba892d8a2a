"""Reads the size of a JPEG or PNG, and whether DALI decodes it as Pillow does, in microseconds and without decoding.

bytes ──read_size──▶ height, width, or None for what DALI would not decode as Pillow does
bytes ──excess, damage──▶ what is wrong with the file

DALI raises for a file whose layout it cannot follow while its threads are still decoding the batch's other images, and
this kills the process (nvidia-dali 2.4). So every sample is checked here before DALI sees it. The check also finds a
size that differs from the index, such as a decompression bomb's, and the kinds of images that DALI decodes to other
colours or not at all; `python -m tests.decoders` prints a table of all kinds.
"""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_PNG = b"\x89PNG\r\n\x1a\n"
# The chunks that decoders must know, in order.
_CRITICAL = re.compile(rb"IHDR(PLTE)?(IDAT)+(IEND)?")
# The position of a PNG's colour type, and the type that needs a palette.
_COLOR = 25
_PALETTE = 3
# The bits a value that each colour type of a PNG allows.
_PNG_DEPTHS = {
    0: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    4: (8, 16),
    6: (8, 16),
}
# The beginning of a PNG's chunk: length and kind.
_CHUNK = struct.Struct(">I4s")
# Three markers of this range are tables.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset([0xC2, 0xCA])
# Lossless and hierarchical JPEGs are not decoded.
_NOT_DECODED = _START_OF_FRAME - _PROGRESSIVE - {0xC0, 0xC1, 0xC9}
_START_OF_SCAN = 0xDA
_END = 0xD9
_ADOBE = 0xEE
# All markers but those that stand within a scan.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# The number of coefficients of a block.
_BLOCK = 64

MAX_SCANS = 100
"""The limit for a JPEG's scans, the most that libjpeg's cjpeg writes. Each scan takes a decoder through the whole
image, however few bytes it has."""
MAX_PARTS = 1 << 17
"""The limit for the segments of a JPEG and for the chunks of a PNG."""
# The limit for bytes between segments, which Pillow reads one by one.
_MAX_FILLING = 1 << 16


def read_size(data: bytes) -> tuple[int, int] | None:
    """Returns height and width in pixels.

    Returns None for anything but a JPEG or PNG that is intact up to its pixels and that DALI decodes as Pillow does.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return None if excess(data) else _read_jpeg_size(data)
    if data.startswith(_PNG):
        return _read_png_size(data)
    return None


def excess(data: bytes) -> str | None:
    """Returns what of a JPEG or PNG, beside its pixels, would cost a decoder much time or memory; None for nothing."""
    if data.startswith(_PNG):
        num_chunks = sum(1 for _ in itertools.islice(_chunks(data), MAX_PARTS + 1))
        return f"more than {MAX_PARTS:,} chunks" if num_chunks > MAX_PARTS else None
    if not data.startswith(b"\xff\xd8"):
        return None
    num_segments = 0
    num_scans = 0
    is_progressive = False
    num_components = b""
    offset = 2
    for marker, start, end in _segments(data, is_forgiving=True):
        num_segments += 1
        if marker in _START_OF_FRAME:
            is_progressive = marker in _PROGRESSIVE
            num_components = data[start + 5 : end][:1]
        if start - offset > _MAX_FILLING:
            break
        offset = end
        if marker != _START_OF_SCAN:
            continue
        num_scans += 1
        # Decoders stop behind a scan that has all components of a sequential JPEG.
        is_last = not is_progressive and data[start : start + 1] >= num_components
        # Counting the marker's bytes in the rest is fast, and never too low.
        if is_last or data.count(b"\xff\xda", end) <= MAX_SCANS - num_scans:
            return None
        if num_scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
        # The bytes of the scan itself are no filling.
        offset = len(data)
    if num_segments > MAX_PARTS:
        return f"more than {MAX_PARTS:,} segments"
    if len(data) - offset > _MAX_FILLING:
        return f"more than {_MAX_FILLING:,} bytes between segments"
    return None


def damage(data: bytes) -> str | None:
    """Returns what is wrong with a JPEG or PNG that Pillow may accept. Reads all of its bytes, and decodes none."""
    if data.startswith(b"\xff\xd8\xff"):
        return "scans are missing" if _lacks_scans(data) else None
    if data.startswith(_PNG) and _has_wrong_chunks(data):
        return "its chunks are out of order or do not match their checksums"
    return None


def is_cut_short(data: bytes) -> bool:
    """Returns whether a JPEG ends without an end marker behind its first scan."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    for marker, _, end in _segments(data):
        if marker == _START_OF_SCAN:
            # From the end, where it stands in all but a few.
            return data.rfind(bytes([0xFF, _END]), end) < 0
    return True


def _lacks_scans(data: bytes) -> bool:
    """Returns whether a JPEG lacks some bits of a coefficient of a component (ITU-T T.81, annex G).

    The scans deliver these bits one after the other, and decoders show what they have.
    """
    is_progressive = False
    is_scanned = False
    # For each component and coefficient: the lowest known bit, 0 before the first scan, -1 once all bits are known.
    lowest: dict[int, npt.NDArray[np.int8]] = {}
    for marker, start, end in _segments(data):
        if marker in _START_OF_FRAME:
            is_progressive = marker in _PROGRESSIVE
            lowest = {component: np.zeros(_BLOCK, np.int8) for component in data[start + 6 : end : 3]}
        elif marker == _START_OF_SCAN:
            is_scanned = True
            # A sequential scan delivers all bits of all coefficients.
            first, last, bits = 0, _BLOCK - 1, 0
            if is_progressive:
                first, last, bits = data[end - 3 : end]
            before, now = divmod(bits, 16)
            for component in lowest.keys() & data[start + 1 : end - 3 : 2]:
                band = lowest[component][first : last + 1]
                band[band == before] = now or -1
    return is_scanned and any(known.max() >= 0 for known in lowest.values())


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    size = None
    num_components = 0
    has_adobe = False
    for marker, start, end in _segments(data):
        if marker == _START_OF_SCAN:
            # Pillow always takes the values of CMYK for inverted, DALI only where Adobe's marker says so.
            is_cmyk = num_components == 4
            return size if has_adobe or not is_cmyk else None
        if marker == _ADOBE:
            has_adobe |= data.startswith(b"Adobe", start) and end - start >= 12
        elif marker in _START_OF_FRAME:
            if marker in _NOT_DECODED or end - start < 6:
                return None
            precision, height, width, num_components = struct.unpack_from(">BHHB", data, start)
            if precision != 8 or num_components not in (1, 3, 4):
                return None
            if end - start != 6 + 3 * num_components:
                return None
            size = height, width
    return None


def _segments(data: bytes, is_forgiving: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yields marker, and start and end of the content, of a JPEG's segments, up to the first that is damaged.

    Behind the first scan, and before it as well if `is_forgiving`, bytes in front of a marker are skipped, as in
    libjpeg.
    """
    offset = 2
    for _ in range(MAX_PARTS + 1):
        match = _MARKER.search(data, offset)
        if not match:
            return
        length_at = match.end()
        start = length_at + 2
        if start > len(data):
            return
        marker = data[length_at - 1]
        end = length_at + int.from_bytes(data[length_at:start])
        is_adjacent = is_forgiving or not data[offset : match.start()].strip(b"\xff")
        if marker < 0xC0 or marker == _END or not is_adjacent:
            return
        if not start <= end <= len(data):
            return
        yield marker, start, end
        offset = end
        is_forgiving |= marker == _START_OF_SCAN


def _has_wrong_chunks(data: bytes) -> bool:
    critical = []
    for kind, start, end in _chunks(data):
        # Kinds in capitals are critical; decoders ignore others.
        if not kind[:1].isupper():
            continue
        checksum = int.from_bytes(data[end : end + 4])
        if zlib.crc32(data[start - 4 : end]) != checksum:
            return True
        critical.append(kind)
    lacks_palette = data[_COLOR] == _PALETTE and b"PLTE" not in critical
    return lacks_palette or not _CRITICAL.fullmatch(b"".join(critical))


def _read_png_size(data: bytes) -> tuple[int, int] | None:
    size = None
    for kind, start, end in itertools.islice(_chunks(data), MAX_PARTS):
        if kind == b"IHDR" and end - start == 13:
            fields = struct.unpack_from(">IIBBB", data, start)
            width, height, depth, color, compression = fields
            if depth not in _PNG_DEPTHS.get(color, ()) or compression:
                return None
            size = height, width
        if kind == b"IEND":
            return size
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, and start and end of the content, of a PNG's chunks, up to the first that is cut short."""
    offset = len(_PNG)
    # Length, kind and checksum take 12 bytes.
    while offset + 12 <= len(data):
        length, kind = _CHUNK.unpack_from(data, offset)
        start = offset + 8
        end = start + length
        if end + 4 > len(data):
            return
        yield kind, start, end
        offset = end + 4
