"""Whether DALI decodes a JPEG or PNG as Pillow does, and its size, in microseconds and without decoding.

DALI raises for a file whose layout it cannot follow while its threads are still at work on the batch's other images,
and the process dies of it (nvidia-dali 2.4). So a sample is looked at here before DALI sees it. A size other than
the index says, such as a decompression bomb's, is found at the same time, and so are the kinds that DALI
decodes to other colours or not at all; `python -m tests.decoders` prints a table of all kinds.
"""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_PNG = b"\x89PNG\r\n\x1a\n"
_CRITICAL = re.compile(rb"IHDR(PLTE)?(IDAT)+(IEND)?")  # chunks that decoders must know, in order
_COLOR, _PALETTE = 25, 3  # where a PNG says its colour type, and one of them
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_CHUNK = struct.Struct(">I4s")  # where a PNG's chunk begins: length, kind
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # these three are tables
_PROGRESSIVE = frozenset([0xC2, 0xCA])
_NOT_DECODED = _START_OF_FRAME - _PROGRESSIVE - {0xC0, 0xC1, 0xC9}  # lossless, hierarchical
_START_OF_SCAN, _END, _ADOBE = 0xDA, 0xD9, 0xEE
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # but for those that stand in a scan
_BLOCK = 64  # coefficients

MAX_SCANS = 100
"""Of a JPEG: what libjpeg's cjpeg writes at most. Each takes a decoder through all of the image, however few bytes."""
MAX_PARTS = 1 << 17
"""Segments of a JPEG, chunks of a PNG."""
_MAX_FILLING = 1 << 16  # bytes between segments, which Pillow reads one by one


def read_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels; None for anything but a JPEG or PNG that can be followed up to its pixels, of
    a kind that DALI decodes as Pillow does."""
    if data.startswith(b"\xff\xd8\xff"):
        return None if excess(data) else _read_jpeg_size(data)
    return _read_png_size(data) if data.startswith(_PNG) else None


def excess(data: bytes) -> str | None:
    """Returns what of a JPEG or PNG, beside its pixels, would take a decoder long or much memory; None for nothing."""
    if data.startswith(_PNG):
        num_chunks = sum(1 for _ in itertools.islice(_chunks(data), MAX_PARTS + 1))
        return f"more than {MAX_PARTS:,} chunks" if num_chunks > MAX_PARTS else None
    if not data.startswith(b"\xff\xd8"):
        return None
    num_segments = num_scans = 0
    is_progressive, components, place = False, b"", 2
    for marker, start, end in _segments(data, is_forgiving=True):
        num_segments += 1
        if marker in _START_OF_FRAME:
            is_progressive, components = marker in _PROGRESSIVE, data[start + 5 : end][:1]
        if start - place > _MAX_FILLING:
            break
        place = end
        if marker != _START_OF_SCAN:
            continue
        num_scans += 1
        has_all = not is_progressive and data[start : start + 1] >= components  # and decoders stop behind it
        if has_all or data.count(b"\xff\xda", end) <= MAX_SCANS - num_scans:
            return None
        if num_scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
        place = len(data)
    if num_segments > MAX_PARTS:
        return f"more than {MAX_PARTS:,} segments"
    return f"more than {_MAX_FILLING:,} bytes between segments" if len(data) - place > _MAX_FILLING else None


def damage(data: bytes) -> str | None:
    """What is wrong with a JPEG or PNG that Pillow may forgive. Reads all of its bytes, and decodes none."""
    if data.startswith(b"\xff\xd8\xff"):
        return "scans are missing" if _misses_scans(data) else None
    if data.startswith(_PNG) and _has_wrong_chunks(data):
        return "its chunks are out of order or do not match their checksums"
    return None


def _misses_scans(data: bytes) -> bool:
    """Whether a JPEG lacks a part of a coefficient of a component (ITU-T T.81, annex G).

    Its scans bring these one after the other, and decoders show what there is.
    """
    is_progressive = is_scanned = False
    # Of each component and coefficient: the lowest bit that is known, 0 before its first scan, -1 once it is whole.
    lowest: dict[int, npt.NDArray[np.int8]] = {}
    for marker, start, end in _segments(data):
        if marker in _START_OF_FRAME:
            is_progressive = marker in _PROGRESSIVE
            lowest = {component: np.zeros(_BLOCK, np.int8) for component in data[start + 6 : end : 3]}
        elif marker == _START_OF_SCAN:
            is_scanned = True
            first, last, bits = data[end - 3 : end] if is_progressive else (0, _BLOCK - 1, 0)
            before, now = divmod(bits, 16)
            for component in lowest.keys() & data[start + 1 : end - 3 : 2]:
                band = lowest[component][first : last + 1]
                band[band == before] = now or -1
    return is_scanned and any(known.max() >= 0 for known in lowest.values())


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    size, components, has_adobe = None, 0, False
    for marker, start, end in _segments(data):
        if marker == _START_OF_SCAN:
            # DALI takes the values of CMYK for inverted where Adobe's marker says so, Pillow always.
            return size if components < 4 or has_adobe else None
        if marker == _ADOBE:
            has_adobe |= data.startswith(b"Adobe", start) and end - start >= 12
        elif marker in _START_OF_FRAME:
            if marker in _NOT_DECODED or end - start < 6:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, start)
            if precision != 8 or components not in (1, 3, 4) or end - start != 6 + 3 * components:
                return None
            size = height, width
    return None


def _segments(data: bytes, is_forgiving: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yields marker, and start and end of the content, of a JPEG's segments, as far as they can be followed.

    Behind the first scan, and before it as well if `is_forgiving`, bytes in front of a marker are skipped, as in
    libjpeg.
    """
    place = 2
    for _ in range(MAX_PARTS + 1):
        found = _MARKER.search(data, place)
        if not found or found.end() + 2 > len(data):
            return
        marker = data[found.end() - 1]
        end = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        is_adjacent = is_forgiving or not data[place : found.start()].strip(b"\xff")
        if marker < 0xC0 or marker == _END or not is_adjacent or not found.end() + 2 <= end <= len(data):
            return
        yield marker, found.end() + 2, end
        place = end
        is_forgiving |= marker == _START_OF_SCAN


def _has_wrong_chunks(data: bytes) -> bool:
    critical = []
    for kind, start, end in _chunks(data):
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
            width, height, depth, color, compression = struct.unpack_from(">IIBBB", data, start)
            if depth not in _PNG_DEPTHS.get(color, ()) or compression:
                return None
            size = height, width
        if kind == b"IEND":
            return size
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, and start and end of the content, of a PNG's chunks, as far as they can be followed."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length, kind = _CHUNK.unpack_from(data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return
        yield kind, place + 8, end
        place = end + 4
