"""Reads the members of a tar strictly and once, from its first byte to its last.

    stream ──Reader: counts and hashes──▶ 512-byte headers (ustar, GNU, PAX) ──▶ Member, Member, … ──▶ end mark

`tarfile` takes a damaged header in the middle, or a missing end, for the end of the tar, and goes backwards on a
negative size. Here each of these is a TarError, and nothing is ever extracted or looked up by name.
"""

import dataclasses
import hashlib
import math
import posixpath
import re
from collections.abc import Iterator
from typing import IO, Literal

BLOCK = 512
_EMPTY = bytes(BLOCK)
# The limit for everything before a member's data: a long name, PAX headers, its own header.
_MAX_HEADER_BYTES = 1 << 20
# The limit for the records of one PAX header.
_MAX_PAX_RECORDS = 1000

Kind = Literal["file", "folder", "link", "sparse", "special"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "link",
    b"2": "link",
    b"5": "folder",
    # GNU's listing of a folder, and name of a volume.
    b"D": "folder",
    b"V": "folder",
    b"S": "sparse",
}
# Links, devices, folders and pipes have no data, even if their header has a size.
_WITHOUT_DATA = b"123456"
_SPARSE = "GNU.sparse"
# The PAX records that are used.
_SPARSE_SIZES = ("GNU.sparse.size", "GNU.sparse.realsize")
_USED = (b"path", b"linkpath", b"size", b"GNU.sparse.name", *map(str.encode, _SPARSE_SIZES))
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


class TarError(ValueError):
    """The stream is not a tar, or is damaged from here on. What was read before stays valid."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    name: str
    """The name, in which undecodable bytes are surrogates, as in Python's file names."""
    kind: Kind
    header: int
    """The offset of its header in the tar, headers with long names included."""
    offset: int
    """The offset of its first byte of data."""
    size: int
    whole_size: int
    """The size of a sparse file with its holes; of others `size`."""
    target: str = ""
    """The name of the member that a link leads to."""


class Reader:
    """Reads a stream forwards, counting and hashing its bytes."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or fewer at the end of the stream."""
        chunks = []
        missing = size
        while missing:
            chunk = self._stream.read(min(missing, 1 << 20))
            if not chunk:
                break
            self._sha256.update(chunk)
            chunks.append(chunk)
            missing -= len(chunk)
        self.position += size - missing
        return b"".join(chunks)

    def take(self, size: int) -> bytes:
        """Returns `size` bytes. Raises TarError where there are fewer."""
        data = self.read(size)
        if len(data) < size:
            raise TarError(f"cut short at byte {self.position}")
        return data

    def skip(self, size: int) -> None:
        """Reads `size` bytes, a bounded number at a time. Raises TarError where there are fewer."""
        while size:
            size -= len(self.take(min(size, 1 << 20)))

    def finish(self, num_bytes: float = math.inf) -> str:
        """Reads to the end, or until more than `num_bytes` are read, and returns the SHA-256 of all that was read."""
        while self.position <= num_bytes and self.read(1 << 20):
            pass
        return self._sha256.hexdigest()


def members(reader: Reader) -> Iterator[Member]:
    """Yields the tar's members. The data of each can be read from `reader` until the next member is requested.

    Raises TarError where the tar is damaged, and for bytes behind its end mark.
    """
    # PAX records for all members from here on, and for the next one.
    common: dict[str, str] = {}
    records: dict[str, str] = {}
    start = reader.position
    while (block := _read_header(reader)) != _EMPTY:
        kind = block[156:157]
        if kind not in b"LKxXg":
            member = _parse_member(block, start, {**common, **records}, reader)
            yield member
            records = {}
            start = member.offset + padded(member.size)
            reader.skip(start - reader.position)
            continue
        data = _read_extended_header(block, start, reader)
        if kind == b"g":
            common.update(_parse_pax_records(data))
            start = reader.position
        elif kind == b"L":
            records["path"] = _decode_text(data)
        elif kind == b"K":
            records["linkpath"] = _decode_text(data)
        else:
            records.update(_parse_pax_records(data))
    end = reader.position - BLOCK
    # Tars are padded with zeros, often to 10 kB.
    while rest := reader.read(1 << 20):
        if rest.strip(b"\0"):
            raise TarError(f"data follows the end mark at byte {end}: joined with cat, or a header was lost")


def _read_header(reader: Reader) -> bytes:
    start = reader.position
    block = reader.read(BLOCK)
    if start and len(block) < BLOCK:
        raise TarError(f"cut short at byte {reader.position}: it ends without a tar's end mark")
    if block == _EMPTY or (len(block) == BLOCK and _is_header(block)):
        return block
    if start:
        raise TarError(f"damaged at byte {start}: no member begins there, and what follows cannot be read")
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise TarError(f"compressed with {name}: decompress it")
    raise TarError("not a tar" if block else "an empty file")


def _is_header(block: bytes) -> bool:
    checksum = block[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]+", checksum):
        return False
    # The checksum's own field counts as spaces.
    total = sum(block[:148]) + sum(b" " * 8) + sum(block[156:])
    return int(checksum, 8) == total


def _parse_member(block: bytes, start: int, records: dict[str, str], reader: Reader) -> Member:
    kind = _KINDS.get(block[156:157], "special")
    name = _decode_text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        prefix = _decode_text(block[345:500])
        name = f"{prefix}/{name}"
    name = records.get("path", name)
    # Tars from before 1988 mark folders by their names.
    if kind == "file" and name.endswith("/"):
        kind = "folder"
    size = _parse_size(block, records, start)
    whole_size = size
    if kind == "sparse":
        whole_size = _parse_number(block[483:495], start)
        # Further blocks continue the map of holes.
        has_more = block[482]
        while has_more:
            has_more = reader.take(BLOCK)[504]
    elif _SPARSE in records:
        kind = "sparse"
        name = records.get("GNU.sparse.name", name)
        for key in _SPARSE_SIZES:
            if key in records:
                whole_size = _parse_decimal(records[key], start)
    target = ""
    if kind == "link":
        target = records.get("linkpath", _decode_text(block[157:257]))
        # A symbolic link leads on from its folder, a hard one from the top of the tar.
        if block[156:157] == b"2":
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return Member(name, kind, start, reader.position, size, whole_size, target)


def _parse_size(block: bytes, records: dict[str, str], start: int) -> int:
    if block[156:157] in _WITHOUT_DATA:
        return 0
    # PAX has a size of its own for files of 8 GB and more.
    if "size" not in records:
        return _parse_number(block[124:136], start)
    return _parse_decimal(records["size"], start)


def _parse_decimal(text: str, start: int) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise TarError(f"damaged at byte {start}: a member of size {text!r}")
    return int(text)


def _read_extended_header(block: bytes, start: int, reader: Reader) -> bytes:
    size = _parse_number(block[124:136], start)
    total = reader.position - start + padded(size)
    if total > _MAX_HEADER_BYTES - BLOCK:
        raise TarError(f"damaged at byte {start}: a name or header of {total} bytes")
    return reader.take(padded(size))[:size]


def _parse_pax_records(data: bytes) -> dict[str, str]:
    """Parses lines of "LENGTH KEY=VALUE", where the length counts the whole line. Keeps only records that are used."""
    records = {}
    start = 0
    count = 0
    while start < len(data):
        count += 1
        if count > _MAX_PAX_RECORDS:
            raise TarError(f"damaged: a PAX header of more than {_MAX_PAX_RECORDS} records")
        length, _, _ = data[start : start + 20].partition(b" ")
        line = b""
        if re.fullmatch(rb"\d{1,7}", length):
            line = data[start : start + int(length)]
        key, equals, value = line[len(length) + 1 : -1].partition(b"=")
        if not equals or not line.endswith(b"\n"):
            raise TarError("damaged: a PAX header that cannot be read")
        if key in _USED:
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        if key.startswith(b"GNU.sparse."):
            records[_SPARSE] = ""
        start += len(line)
    return records


def _parse_number(field: bytes, start: int) -> int:
    # Base 256, for numbers that octal digits cannot hold. 0xff would begin a negative number.
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise TarError(f"damaged at byte {start}: {text!r} is not a number")
    return int(text or b"0", 8)


def _decode_text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def padded(size: int) -> int:
    """Returns the size that a member's data takes in a tar, a multiple of BLOCK."""
    return -(-size // BLOCK) * BLOCK
