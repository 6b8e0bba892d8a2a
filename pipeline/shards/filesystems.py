"""Where the files of a data set are kept: a folder, or anything that fsspec speaks (s3, http, gs, …).

    name ──▶ Folder ──os.pread──▶ bytes
    name ──▶ Remote ──range requests, each tried again on its own──▶ bytes

Every byte of a large remote file comes through one primitive, the range request, so every failure is met in one place.
"""

import errno
import io
import os
import re
import sys
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec.asyn
import fsspec.core

from pipeline import files
from pipeline.errors import InputError
from pipeline.redact import redact, split_url
from pipeline.shards.class_folders import files_below, is_system, report_ignored
from pipeline.shards.open_files import Descriptors
from pipeline.shards.retry import Retry, StoreError, WrongBytes

BLOCK_BYTES = 8 << 20
"""Largest range request: what a broken connection costs, and large enough for its latency not to matter."""

MIN_BYTES_PER_S = 32 << 10
"""A request that is slower than this on top of the time-out is given up: bytes that trickle could hold us for days."""

READ_BYTES = 1 << 20
"""A small file that is read whole takes no longer than this much may take, whatever its size."""


@dataclass(frozen=True)
class Blob:
    """A file of a data set, known by its digest. `name` is relative to the data set's root.

    Raises InputError for what is no file below the root or no digest: manifests come from elsewhere.
    """

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        below_root(self.name)
        sha256_hex(self.sha256)
        if self.bytes < 0:
            raise InputError(f"{self.name}: {self.bytes} bytes; expected 0 or more")


class Folder:
    """Files below a local folder."""

    def __init__(self, root: Path, retry: Retry):
        self.root = str(root)
        self._retry = retry
        self._open = Descriptors[str](lambda name: files.open_regular(self.url(name)))

    def url(self, name: str) -> str:
        return os.path.join(self.root, below_root(name))  # noqa: PTH118  # called for each sample

    def size(self, name: str) -> int | None:
        path = Path(self.url(name))
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, most_bytes: int) -> bytes:
        return self._retry(self.url(name), lambda: files.read(self.url(name), most_bytes))

    def pread(self, blob: Blob, offset: int, size: int) -> bytes:
        def attempt() -> bytes:
            try:
                return self._open.pread(blob.name, offset, size)
            except OSError:  # of a network file system; a new descriptor mends a stale one
                self._close(blob.name)
                raise

        return self._retry(self.url(blob.name), attempt)

    def _close(self, name: str) -> None:
        if (descriptor := self._open.pop(name)) is not None:
            os.close(descriptor)

    def open(self, name: str) -> BinaryIO:
        return os.fdopen(files.open_regular(self.url(name)), "rb")

    def names(self) -> list[str]:
        ignored: list[str] = []
        found = [os.path.relpath(path, self.root) for path in files_below(self.root, ignored)]
        report_ignored(ignored)
        return sorted(found)

    def close(self) -> None:
        self._open.close()


class Remote:
    """Files below a URL. Endpoints and credentials come from the environment, as each protocol's library reads them,
    and so does the query of URL?$NAME.

    Raises InputError for a protocol that is unknown or whose package is missing, and for a variable without a value.
    """

    def __init__(self, root: str, retry: Retry, timeout_s: float):
        self._retry = retry
        self._timeout_s = timeout_s
        self._is_http = is_http(root)
        root, query = split_query(root)
        self._query = _from_environment(query)
        self.root = _without_user(root)
        if self._is_http:
            from yarl import URL

            root = str(URL(root))  # quoted, as names and the query are
        try:
            fs, self._path = fsspec.core.url_to_fs(root, skip_instance_cache=True, **_options(root, timeout_s))
        except ImportError as error:
            s3 = "; pip install -e '.[s3]' in this project's folder" if root.startswith(("s3:", "s3a:")) else ""
            raise InputError(f"{self.root}: cannot be opened: {redact(str(error))}{s3}") from None
        except ValueError as error:
            raise InputError(f"{self.root}: cannot be opened: {redact(str(error))}") from None
        self._fs: Any = fs
        if hasattr(fs, "retries"):
            fs.retries = 1  # s3fs: we do that, and say so
        self.honours_ranges = True

    def url(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{below_root(name)}"

    def _full_path(self, name: str) -> str:
        """What fsspec calls the file."""
        name = urllib.parse.quote(name) if self._is_http else name
        return f"{self._path.rstrip('/')}/{name}{self._query}"

    def _limit(self, num_bytes: int = BLOCK_BYTES) -> dict[str, float]:
        # fsspec's asynchronous file systems take a time-out for the whole call, to connect, wait and read. Others have
        # their own.
        return {"timeout": 2 * self._timeout_s + num_bytes / MIN_BYTES_PER_S} if self._fs.async_impl else {}

    def size(self, name: str) -> int | None:
        def attempt() -> int | None:
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._full_path(name), **self._limit(0))
            except FileNotFoundError as error:
                # For HTTP, fsspec calls every failure a missing file; the cause tells.
                if self._is_http and isinstance(error.__cause__, Exception):
                    if getattr(error.__cause__, "status", None) in (404, 410):
                        return None
                    raise error.__cause__ from None
                return None
            if info["type"] != "file":
                return None
            if info["size"] is None:
                raise StoreError(f"{self.url(name)}: the server does not tell its size (no Content-Length)")
            return info["size"]

        return self._retry(self.url(name), attempt)

    def read(self, name: str, most_bytes: int) -> bytes:
        path = self._full_path(below_root(name))

        def attempt() -> bytes:
            data, _ = self._fetch(path, most_bytes + 1, READ_BYTES)
            if len(data) > most_bytes:
                raise files.UnreadableError(errno.EFBIG, f"more than {most_bytes:,} bytes")
            return data

        return self._retry(self.url(name), attempt)

    def _fetch(self, path: str, size: int, num_bytes: int, start: int | None = None) -> tuple[bytes, bool]:
        """Returns up to `size` bytes, from `start` on if that is given, and whether the server sent no more than these.

        It has the time that `num_bytes` may take.
        """
        limit = self._limit(num_bytes)
        if not self._is_http:
            return self._fs.cat_file(path, start=start or 0, end=(start or 0) + size, **limit), True
        return cast(tuple[bytes, bool], fsspec.asyn.sync(self._fs.loop, self._stream, path, size, start, **limit))

    async def _stream(self, path: str, size: int, start: int | None) -> tuple[bytes, bool]:
        # fsspec's own functions hold whatever the server sends, however much.
        session = await self._fs.set_session()
        headers = {} if start is None else {"Range": f"bytes={start}-{start + size - 1}"}
        data = bytearray()
        async with session.get(self._fs.encode_url(path), headers=headers) as answer:
            self._fs._raise_not_found_for_status(answer, path)
            if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                why = f"the server sends it encoded ({coding[:20]}): serve the file as it is"
                raise files.UnreadableError(errno.EINVAL, why)
            is_part = answer.status == HTTPStatus.PARTIAL_CONTENT
            skip = 0 if is_part else start or 0
            while len(data) < size and (block := await answer.content.read(BLOCK_BYTES)):
                data += block[skip:]
                skip = max(0, skip - len(block))
            return bytes(data[:size]), is_part

    def pread(self, blob: Blob, offset: int, size: int) -> bytes:
        return self._retry(self.url(blob.name), lambda: self._range(blob.name, offset, size, blob.bytes))

    def _range(self, name: str, offset: int, size: int, total: int) -> bytes:
        if size == 0:
            return b""
        num_bytes = size if self.honours_ranges else total
        data, is_part = self._fetch(self._full_path(name), size, num_bytes, start=offset)
        if self.honours_ranges and not is_part and size < total:
            self.honours_ranges = False
            print(
                f"warning: {self.url(name)}: the server ignores Range and sends whole files, "
                "so reading single samples from it is slow; give the cache room for the shards in use",
                file=sys.stderr,
            )
        if len(data) != size:
            raise WrongBytes(f"{len(data)} bytes arrived instead of {size} from offset {offset}")
        return data

    def open(self, name: str) -> BinaryIO:
        total = self.size(name)
        if total is None:
            raise FileNotFoundError(f"{self.url(name)}: no such file")

        def read(offset: int, size: int) -> bytes:
            return self._retry(self.url(name), lambda: self._range(name, offset, size, total))

        return cast(BinaryIO, io.BufferedReader(_Ranges(read, total), BLOCK_BYTES))

    def names(self) -> list[str]:
        if self._is_http:
            raise InputError(
                f"{self.root}: HTTP has no listing of files; name them, such as {self.root}/train-{{000..146}}.tar, "
                "or give a folder or s3:// location of the same files"
            )
        root = self._path.rstrip("/") + "/"

        def attempt() -> list[str]:
            self._fs.invalidate_cache()
            return sorted(path.removeprefix(root) for path in self._fs.find(root, **self._limit()))

        found = self._retry(self.root, attempt)
        report_ignored(list(filter(is_system, found)))
        return [name for name in found if not is_system(name)]

    def close(self) -> None:
        """Nothing: fsspec closes its connections with the object."""


class _Ranges(io.RawIOBase):
    """A remote file as Python's file layer sees it, below a buffer."""

    def __init__(self, read: Callable[[int, int], bytes], total: int):
        self._read = read
        self._total = total
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._total}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._take(BLOCK_BYTES), b""))

    def _take(self, size: int) -> bytes:
        data = self._read(self._position, max(0, min(size, self._total - self._position)))
        self._position += len(data)
        return data


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def split_query(url: str) -> tuple[str, str]:
    """The address, and the query of an http URL from its question mark on: what signs it."""
    address, mark, query = url.partition("#")[0].partition("?") if is_http(url) else (url, "", "")
    return address, mark + query


def _from_environment(query: str) -> str:
    """Returns the query, or for ?$NAME the value of that variable, so that no file has to hold a signature."""
    match = re.fullmatch(r"\?\$(\w+|\{\w+\})", query)
    if not match:
        return query
    variable, value = match[1].strip("{}"), os.path.expandvars(query[1:])
    if value in ("", query[1:]):  # which expandvars leaves as it is where there is no such variable
        raise InputError(f"a URL ends with ?${variable}, but {variable} has no value here: export {variable}=QUERY")
    return f"?{value.removeprefix('?')}"


def _without_user(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    user, *place = split_url(rest)
    if "/" in user:
        raise InputError(f"{redact(url)}: in a URL write %2F for a / of a password, and %40 for an @ of a path")
    return "".join([scheme, mark, *place])


def below_root(name: str) -> str:
    """`name`, if it stays below the root in every store. Raises InputError."""
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or re.search(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]", name):
        raise InputError(
            f"{name!r}: not a file below the data set's root: absolute and empty names, '.', '..', backslashes, "
            "control characters and what is not UTF-8 are refused"
        )
    return name


def sha256_hex(digest: str) -> str:
    """`digest`, if it is a SHA-256 in lower-case hexadecimal. Raises InputError."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise InputError(f"SHA-256 {digest[:100]!r}; expected 64 digits of lower-case hexadecimal")
    return digest


def _options(root: str, timeout_s: float) -> dict[str, Any]:
    """Time-outs for connecting and between bytes, and no retries, in the words of each library."""
    if is_http(root):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        # Ranges of a compressed body would be ranges of something else. trust_env: proxies and .netrc.
        client = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        client["auto_decompress"] = False
        return {"client_kwargs": client, "encoded": True}  # a signature is sent as it is
    if root.startswith(("s3://", "s3a://")):
        config = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
        }
        return {"config_kwargs": config, "max_concurrency": 1}
    return {}
