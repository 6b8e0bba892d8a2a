"""The members of a tar, read strictly and once, from its first byte to its last.

    stream ──Reader: counts and hashes──▶ 512-byte headers (ustar, GNU, PAX) ──▶ Member, Member, … ──▶ end mark

`tarfile` takes a damaged header in the middle, or a missing end, for the end of the tar, and goes backwards on a
negative size. Here each of these is a TarError, and nothing is ever extracted or looked up by name.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator
from typing import IO, Literal

BLOCK = 512
_EMPTY = bytes(BLOCK)
_MAX_HEADER_BYTES = 1 << 20  # before a member's data: a long name, PAX headers, its own header
_MAX_PAX_RECORDS = 1000  # of one header

Kind = Literal["file", "folder", "link", "sparse", "special"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys([b"0", b"\0", b"7"], "file"),
    **dict.fromkeys([b"1", b"2"], "link"),
    **dict.fromkeys([b"5", b"D", b"V"], "folder"),  # D and V: GNU's, a folder's listing and a volume's name
    b"S": "sparse",
}
_WITHOUT_DATA = b"123456"  # links, devices, folders and pipes, whatever their header says of a size
_SPARSE = "GNU.sparse"
_USED = (b"path", b"size", b"GNU.sparse.name")  # of PAX records
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


class TarError(ValueError):
    """The stream is not a tar, or not from here on. What was read before stays valid."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    name: str
    """Undecodable bytes are surrogates, as Python has them in file names."""
    kind: Kind
    header: int
    """Where its header begins in the tar, headers of long names included."""
    offset: int
    """Of its first byte of data."""
    size: int


class Reader:
    """Reads a stream forwards, counting and hashing its bytes."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the stream."""
        parts, missing = [], size
        while missing and (part := self._stream.read(min(missing, 1 << 20))):
            self._sha256.update(part)
            parts.append(part)
            missing -= len(part)
        self.position += size - missing
        return b"".join(parts)

    def take(self, size: int) -> bytes:
        """`size` bytes. Raises TarError where there are fewer."""
        if len(data := self.read(size)) < size:
            raise TarError(f"cut short at byte {self.position}")
        return data

    def skip(self, size: int) -> None:
        """Raises TarError where there are fewer bytes left."""
        while size:
            size -= len(self.take(min(size, 1 << 20)))

    def finish(self, num_bytes: float = math.inf) -> str:
        """Read to the end, or until there are more than `num_bytes`; the SHA-256 of all that was read."""
        while self.position <= num_bytes and self.read(1 << 20):
            pass
        return self._sha256.hexdigest()


def members(reader: Reader) -> Iterator[Member]:
    """The tar's members. The data of each can be read from `reader` until the next is asked for.

    Raises TarError at the first place from which the tar cannot be read, and at bytes behind its end mark.
    """
    common: dict[str, str] = {}  # PAX records for all members from here on
    records: dict[str, str] = {}  # and for the next one
    start = reader.position
    while (block := _read_header(reader)) != _EMPTY:
        kind = block[156:157]
        if kind not in b"LKxXg":
            member = _member(block, start, {**common, **records}, reader)
            yield member
            records = {}
            start = member.offset + padded(member.size)
            reader.skip(start - reader.position)
            continue
        data = _extended_header(block, start, reader)
        if kind == b"g":
            common.update(_pax_records(data))
            start = reader.position
        elif kind == b"L":
            records["path"] = _text(data)
        elif kind != b"K":  # where a link leads does not matter
            records.update(_pax_records(data))
    end = reader.position - BLOCK
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
    found = sum(block[:148]) + sum(b" " * 8) + sum(block[156:])
    return re.fullmatch(rb"[0-7]+", checksum) is not None and int(checksum, 8) == found


def _member(block: bytes, start: int, records: dict[str, str], reader: Reader) -> Member:
    kind = _KINDS.get(block[156:157], "special")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    name = records.get("path", name)
    if kind == "file" and name.endswith("/"):  # as tars from before 1988 have it
        kind = "folder"
    if kind == "sparse":
        more = block[482]
        while more:  # blocks that continue the map of holes
            more = reader.take(BLOCK)[504]
    elif _SPARSE in records:
        kind, name = "sparse", records.get("GNU.sparse.name", name)
    return Member(name, kind, start, reader.position, _size(block, records, start))


def _size(block: bytes, records: dict[str, str], start: int) -> int:
    if block[156:157] in _WITHOUT_DATA:
        return 0
    if "size" not in records:
        return _number(block[124:136], start)
    if not re.fullmatch(r"\d{1,18}", records["size"], re.ASCII):
        raise TarError(f"damaged at byte {start}: a member of size {records['size']!r}")
    return int(records["size"])


def _extended_header(block: bytes, start: int, reader: Reader) -> bytes:
    size = _number(block[124:136], start)
    total = reader.position - start + padded(size)
    if total > _MAX_HEADER_BYTES - BLOCK:
        raise TarError(f"damaged at byte {start}: a name or header of {total} bytes")
    return reader.take(padded(size))[:size]


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse lines of "LENGTH KEY=VALUE", where the length counts the whole line. Only what is used is kept."""
    records, start, count = {}, 0, 0
    while start < len(data):
        count += 1
        if count > _MAX_PAX_RECORDS:
            raise TarError(f"damaged: a PAX header of more than {_MAX_PAX_RECORDS} records")
        length, _, _ = data[start : start + 20].partition(b" ")
        line = data[start : start + int(length)] if re.fullmatch(rb"\d{1,7}", length) else b""
        key, equals, value = line[len(length) + 1 : -1].partition(b"=")
        if not equals or not line.endswith(b"\n"):
            raise TarError("damaged: a PAX header that cannot be read")
        if key in _USED:
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        if key.startswith(b"GNU.sparse."):
            records[_SPARSE] = ""
        start += len(line)
    return records


def _number(field: bytes, start: int) -> int:
    if field[0] == 0x80:  # base 256, for what octal digits cannot hold; 0xff would begin a negative number
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise TarError(f"damaged at byte {start}: {text!r} is not a number")
    return int(text or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
