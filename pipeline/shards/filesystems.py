"""Reads the files of a data set from a folder, or from any protocol that fsspec supports (s3, http, gs, …).

    name ──▶ Folder ──os.pread──▶ bytes
    name ──▶ Remote ──range requests, each with its own retries──▶ bytes

Every byte of a large remote file comes through one primitive, the range request, so failures are handled in one place.
"""

import errno
import io
import logging
import os
import re
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

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""The largest range request: what a broken connection costs, and large enough for its latency not to matter."""

MIN_BYTES_PER_S = 32 << 10
"""The rate below which a request is given up, on top of the time-out: a server that trickles could hold us for days."""

READ_BYTES = 1 << 20
"""The bytes that the time limit for reading a whole small file is computed from, whatever the file's size."""


# Control characters, backslashes and lone surrogates.
_BAD_IN_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")


@dataclass(frozen=True)
class Blob:
    """A file of a data set, known by its digest. `name` is relative to the data set's root.

    Raises InputError for a name that leads out of the root and for a malformed digest, because manifests may come from
    anybody.
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
        # Faster than pathlib, and called for each sample.
        return os.path.join(self.root, below_root(name))  # noqa: PTH118

    def size(self, name: str) -> int | None:
        path = Path(self.url(name))
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, most_bytes: int) -> bytes:
        return self._retry(self.url(name), lambda: files.read(self.url(name), most_bytes))

    def pread(self, blob: Blob, offset: int, size: int) -> bytes:
        def attempt() -> bytes:
            try:
                return self._open.pread(blob.name, offset, size)
            except OSError:
                # On a network file system the descriptor may be stale. The retry opens a new one.
                self._close(blob.name)
                raise

        return self._retry(self.url(blob.name), attempt)

    def _close(self, name: str) -> None:
        descriptor = self._open.pop(name)
        if descriptor is not None:
            os.close(descriptor)

    def open(self, name: str) -> BinaryIO:
        return os.fdopen(files.open_regular(self.url(name)), "rb")

    def names(self) -> list[str]:
        ignored: list[str] = []
        names = [os.path.relpath(path, self.root) for path in files_below(self.root, ignored)]
        report_ignored(ignored)
        return sorted(names)

    def close(self) -> None:
        self._open.close()


class Remote:
    """Files below a URL.

    Endpoints and credentials come from the environment, as each protocol's library reads them, and the query of
    URL?$NAME comes from the variable NAME.

    Raises InputError for a protocol that is unknown or whose package is missing, and for a variable without a value.
    """

    def __init__(self, root: str, retry: Retry, timeout_s: float):
        self._retry = retry
        self._timeout_s = timeout_s
        self._is_http = is_http(root)
        root, query = split_query(root)
        self._query = _expand_query(query)
        self.root = _drop_user(root)
        if self._is_http:
            from yarl import URL

            # aiohttp is told below that URLs are quoted already: names and the query are.
            root = str(URL(root))
        try:
            fs, self._path = fsspec.core.url_to_fs(
                root,
                skip_instance_cache=True,
                **_options(root, timeout_s),
            )
        except (ImportError, ValueError) as error:
            remedy = ""
            if isinstance(error, ImportError) and root.startswith(("s3:", "s3a:")):
                remedy = "; pip install -e '.[s3]' in this project's folder"
            # The cause is cut off, because libraries put credentials into their messages.
            raise InputError(f"{self.root}: cannot be opened: {redact(str(error))}{remedy}") from None
        self._fs: Any = fs
        # s3fs would retry on its own and log nothing; `Retry` does both.
        if hasattr(fs, "retries"):
            fs.retries = 1
        self.honours_ranges = True

    def url(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{below_root(name)}"

    def _full_path(self, name: str) -> str:
        """Returns the file's path as fsspec takes it."""
        if self._is_http:
            name = urllib.parse.quote(name)
        return f"{self._path.rstrip('/')}/{name}{self._query}"

    def _time_limit(self, num_bytes: int = BLOCK_BYTES) -> dict[str, float]:
        # fsspec's asynchronous file systems take a time-out for the whole call, to connect, wait and read. Others have
        # their own.
        if not self._fs.async_impl:
            return {}
        return {"timeout": 2 * self._timeout_s + num_bytes / MIN_BYTES_PER_S}

    def size(self, name: str) -> int | None:
        def attempt() -> int | None:
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._full_path(name), **self._time_limit(0))
            except FileNotFoundError as error:
                # For HTTP, fsspec reports every failure as a missing file; its cause says what happened.
                cause = error.__cause__
                if not self._is_http or not isinstance(cause, Exception):
                    return None
                if getattr(cause, "status", None) in (404, 410):
                    return None
                raise cause from None
            if info["type"] != "file":
                return None
            if info["size"] is None:
                raise StoreError(f"{self.url(name)}: the server does not report its size (no Content-Length)")
            return info["size"]

        return self._retry(self.url(name), attempt)

    def read(self, name: str, most_bytes: int) -> bytes:
        path = self._full_path(below_root(name))

        def attempt() -> bytes:
            # One byte more than allowed shows that the file is too large.
            data, _ = self._fetch(path, most_bytes + 1, READ_BYTES)
            if len(data) > most_bytes:
                raise files.UnreadableError(errno.EFBIG, f"more than {most_bytes:,} bytes")
            return data

        return self._retry(self.url(name), attempt)

    def _fetch(self, path: str, size: int, num_bytes: int, start: int | None = None) -> tuple[bytes, bool]:
        """Returns up to `size` bytes, from `start` on if that is given, and whether the server sent these alone.

        The time limit is the one for `num_bytes`.
        """
        limit = self._time_limit(num_bytes)
        first = start or 0
        if self._is_http:
            stream, arguments = self._stream_url, (path, size, start)
        elif hasattr(self._fs, "_call_s3"):
            stream, arguments = self._stream_object, (path, size, first)
        else:
            return self._fs.cat_file(path, start=first, end=first + size, **limit), True
        answer = fsspec.asyn.sync(self._fs.loop, stream, *arguments, **limit)
        return cast(tuple[bytes, bool], answer)

    # fsspec's own functions hold in memory whatever the server sends, however much. These two stop at `size`.

    async def _stream_object(self, path: str, size: int, start: int) -> tuple[bytes, bool]:
        bucket, key, _ = self._fs.split_path(path)
        last = start + size - 1
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{last}")
        body = answer["Body"]
        data = bytearray()
        try:
            while len(data) < size:
                block = await body.read(min(BLOCK_BYTES, size - len(data)))
                if not block:
                    break
                data += block
        finally:
            body.close()
        return bytes(data), True

    async def _stream_url(self, path: str, size: int, start: int | None) -> tuple[bytes, bool]:
        session = await self._fs.set_session()
        headers = {}
        if start is not None:
            headers["Range"] = f"bytes={start}-{start + size - 1}"
        data = bytearray()
        async with session.get(self._fs.encode_url(path), headers=headers) as answer:
            self._fs._raise_not_found_for_status(answer, path)
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                reason = f"the server sends it encoded ({encoding[:20]}): serve the file as it is"
                raise files.UnreadableError(errno.EINVAL, reason)
            is_partial = answer.status == HTTPStatus.PARTIAL_CONTENT
            # A server that ignores Range sends the file from its beginning.
            skip = 0 if is_partial else start or 0
            while len(data) < size:
                block = await answer.content.read(BLOCK_BYTES)
                if not block:
                    break
                data += block[skip:]
                skip = max(0, skip - len(block))
            return bytes(data[:size]), is_partial

    def pread(self, blob: Blob, offset: int, size: int) -> bytes:
        return self._retry(
            self.url(blob.name),
            lambda: self._read_range(blob.name, offset, size, blob.bytes),
        )

    def _read_range(self, name: str, offset: int, size: int, total: int) -> bytes:
        if size == 0:
            return b""
        num_bytes = size if self.honours_ranges else total
        path = self._full_path(name)
        data, is_partial = self._fetch(path, size, num_bytes, start=offset)
        if self.honours_ranges and not is_partial and size < total:
            self.honours_ranges = False
            log.warning(
                f"{self.url(name)}: the server ignores Range and sends whole files, "
                "so reading single samples from it is slow; give the cache room for the shards in use"
            )
        if len(data) != size:
            raise WrongBytes(f"{len(data)} bytes arrived instead of {size} from offset {offset}")
        return data

    def open(self, name: str) -> BinaryIO:
        total = self.size(name)
        if total is None:
            raise FileNotFoundError(f"{self.url(name)}: no such file")

        def read(offset: int, size: int) -> bytes:
            return self._retry(
                self.url(name),
                lambda: self._read_range(name, offset, size, total),
            )

        reader = io.BufferedReader(RangeReader(read, total), BLOCK_BYTES)
        return cast(BinaryIO, reader)

    def names(self) -> list[str]:
        if self._is_http:
            raise InputError(
                f"{self.root}: HTTP has no listing of files; name them, such as {self.root}/train-{{000..146}}.tar, "
                "or give a folder or s3:// location of the same files"
            )
        root = self._path.rstrip("/") + "/"

        def attempt() -> list[str]:
            self._fs.invalidate_cache()
            paths = self._fs.find(root, **self._time_limit())
            return sorted(path.removeprefix(root) for path in paths)

        names = self._retry(self.root, attempt)
        report_ignored(list(filter(is_system, names)))
        return [name for name in names if not is_system(name)]

    def close(self) -> None:
        """Does nothing: fsspec closes its connections with the object."""


class RangeReader(io.RawIOBase):
    """A remote file as Python's raw file layer, to be put below a buffer."""

    def __init__(self, read: Callable[[int, int], bytes], total: int):
        self._read = read
        self._total = total
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._total,
        }
        self._position = max(0, starts[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._take(BLOCK_BYTES), b""))

    def _take(self, size: int) -> bytes:
        left = max(0, self._total - self._position)
        data = self._read(self._position, min(size, left))
        self._position += len(data)
        return data


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def split_query(url: str) -> tuple[str, str]:
    """Splits an http URL into the address and the query that signs it, with its question mark. Others have no query."""
    if not is_http(url):
        return url, ""
    without_fragment, _, _ = url.partition("#")
    address, mark, query = without_fragment.partition("?")
    return address, mark + query


def _expand_query(query: str) -> str:
    """Returns the query, or for ?$NAME the value of that variable, so that no file has to hold a signature."""
    match = re.fullmatch(r"\?\$(\w+|\{\w+\})", query)
    if not match:
        return query
    variable = match[1].strip("{}")
    reference = query[1:]
    # A variable that is not set stays in the text as it is.
    value = os.path.expandvars(reference)
    if value in ("", reference):
        raise InputError(f"a URL ends with ?${variable}, but {variable} has no value here: export {variable}=QUERY")
    return f"?{value.removeprefix('?')}"


def _drop_user(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    user, address, query = split_url(rest)
    if "/" in user:
        raise InputError(f"{redact(url)}: in a URL write %2F for a / of a password, and %40 for an @ of a path")
    return f"{scheme}{mark}{address}{query}"


def below_root(name: str) -> str:
    """Returns `name` if it stays below the root in every store. Raises InputError otherwise."""
    is_relative = {"", ".", ".."}.isdisjoint(name.split("/"))
    if not is_relative or _BAD_IN_NAMES.search(name):
        raise InputError(
            f"{name!r}: not a file below the data set's root: absolute and empty names, '.', '..', backslashes, "
            "control characters and what is not UTF-8 are refused"
        )
    return name


def sha256_hex(digest: str) -> str:
    """Returns `digest` if it is a SHA-256 in lower-case hexadecimal. Raises InputError otherwise."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise InputError(f"SHA-256 {digest[:100]!r}; expected 64 digits of lower-case hexadecimal")
    return digest


def _options(root: str, timeout_s: float) -> dict[str, Any]:
    """Returns each library's settings for time-outs, for connecting and between bytes, and for no retries."""
    if is_http(root):
        import aiohttp

        client = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
            # Proxies and .netrc.
            "trust_env": True,
            # Ranges of a compressed body would be ranges of something else.
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,
        }
        # Encoded: a signature is sent exactly as it is.
        return {"client_kwargs": client, "encoded": True}
    if root.startswith(("s3://", "s3a://")):
        config = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
        }
        return {"config_kwargs": config, "max_concurrency": 1}
    return {}
