"""Reads bytes of a data set's files, wherever they are stored.

    local    pread ──▶ Folder
    remote   pread ──▶ Cache ──on a miss, the whole file, verified──▶ Remote
                         └─────where it has no room, the range──────▶ Remote
             prefetch ──threads──▶ Cache

A `Store` is shared by the threads of one process; its `Cache` by all processes of a node.
"""

import contextlib
import errno
import functools
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

from pipeline import files
from pipeline.shards.cache import Cache
from pipeline.shards.filesystems import BLOCK_BYTES, Blob, Folder, Remote
from pipeline.shards.open_files import Descriptors
from pipeline.shards.retry import Retry, StoreError, WrongBytes

__all__ = ["Blob", "Cache", "Retry", "Store", "StoreError"]

NUM_PREFETCH_THREADS = 4
FULL_PAUSE_S = 5.0
"""The time for which a cache that had no room is not asked again."""


class Store:
    """The files below `root`: a folder, file://, s3://, http(s):// or another protocol that fsspec supports.

    Remote files are kept in `cache`, which may be a function that is called when a cache is first needed; None means
    `Cache.default()`. `timeout_s` limits connecting and each wait for bytes. `root` and `url` never contain
    credentials. Reading raises StoreError where retrying did not help, and InputError for invalid names and for
    protocols that are not available.
    """

    def __init__(
        self,
        root: str | Path,
        cache: Cache | Callable[[], Cache] | None = None,
        *,
        retry: Retry | None = None,
        timeout_s: float = 30.0,
    ):
        self._retry = retry or Retry()
        self.is_local = "://" not in str(root) or str(root).startswith("file://")
        if self.is_local:
            self._origin = Folder(Path(str(root).removeprefix("file://")), self._retry)
        else:
            self._origin = Remote(str(root), self._retry, timeout_s)
        self.root = self._origin.root
        self._given_cache = cache
        self._cached = Descriptors(self._open_cached)
        self._fetching: dict[str, Future[bool]] = {}
        self._lock = threading.Lock()
        self._full_until = 0.0
        self._queue: queue.SimpleQueue[Blob | None] = queue.SimpleQueue()
        self._queued: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @functools.cached_property
    def _cache(self) -> Cache | None:
        # Made when it is first needed: listing and indexing need none.
        if self.is_local:
            return None
        cache = self._given_cache or Cache.default
        return cache if isinstance(cache, Cache) else cache()

    def url(self, name: str) -> str:
        """Returns the file's full name for messages."""
        return self._origin.url(name)

    def size(self, name: str) -> int | None:
        """Returns the file's size in bytes; None where there is no such file."""
        return self._origin.size(name)

    def read(self, name: str, most_bytes: int = files.MAX_DOCUMENT_BYTES) -> bytes:
        """Returns a whole small file whose digest is not known. Raises FileNotFoundError."""
        return self._origin.read(name, most_bytes)

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading in order, past the cache; remote files in large blocks. Raises FileNotFoundError."""
        return self._origin.open(name)

    def names(self) -> list[str]:
        """Returns the names of all files below the root, relative to it and sorted.

        Hidden and system entries are ignored, and their number is reported. Links to folders are followed. Raises
        InputError for HTTP.
        """
        return self._origin.names()

    def load(self, blob: Blob) -> bytes:
        """Returns a whole small file, cached when remote, and checks its digest. Raises StoreError."""
        data = self.pread(blob, 0, blob.bytes)
        if hashlib.sha256(data).hexdigest() == blob.sha256:
            return data
        if self.is_local:
            raise StoreError(f"{self.url(blob.name)}: does not match its SHA-256: it was changed after packing")

        # The cached copy may be damaged, or bytes may have been lost on the way.
        def attempt() -> bytes:
            data = self.pread_origin(blob, 0, blob.bytes)
            _compare(hashlib.sha256(data).hexdigest(), blob)
            return data

        return self._retry(self.url(blob.name), attempt, on=WrongBytes)

    def pread(self, blob: Blob, offset: int, size: int) -> bytes:
        """Returns `size` bytes of a file from `offset` on, or fewer where a local file has been cut short.

        A remote file is fetched whole and verified before its first byte is returned. Where the cache has no room for
        it, and for local files, nothing is verified, and the caller compares the sample's checksum.
        """
        if self._cache:
            data = self._from_cache(self._cache, blob, offset, size)
            if data is not None:
                return data
        return self._from_origin(blob, offset, size)

    def pread_origin(self, blob: Blob, offset: int, size: int) -> bytes:
        """Returns what `pread` does from the origin, and drops the cached copy, which may be damaged."""
        if self._cache:
            self._drop(self._cache, blob)
        return self._from_origin(blob, offset, size)

    def prefetch(self, blobs: Iterable[Blob]) -> None:
        """Starts to fetch files into the cache, in order, in the background. Cached files are kept.

        Errors are not reported, because the read that needs the file reports them.
        """
        if not self._cache or self._closed:
            return
        with self._lock:
            for blob in blobs:
                if blob.sha256 not in self._queued and not self._cache.use(blob.sha256):
                    self._queued.add(blob.sha256)
                    self._queue.put(blob)
            while self._queued and len(self._threads) < NUM_PREFETCH_THREADS:
                # Daemons: a program that ends does not wait for downloads, and what they leave is as after a kill.
                thread = threading.Thread(
                    target=self._prefetch,
                    args=(self._cache,),
                    name="prefetch",
                    daemon=True,
                )
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Closes files and ends prefetching, without waiting for downloads in progress."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        self._cached.close()
        self._origin.close()

    def _prefetch(self, cache: Cache) -> None:
        while (blob := self._queue.get()) is not None and not self._closed:
            with contextlib.suppress(StoreError):
                self._fetch(cache, blob)
            self._queued.discard(blob.sha256)

    def _from_cache(self, cache: Cache, blob: Blob, offset: int, size: int) -> bytes | None:
        """Returns bytes of a cached file, which is fetched first if necessary.

        Returns None where the origin has to be read: the cache has no room, its disk fails, or its copy vanishes at
        once.
        """
        # Twice, because the file may be evicted between fetching and opening it.
        for _ in range(2):
            try:
                data = self._cached.pread(blob, offset, size)
            except FileNotFoundError:
                if not self._fetch(cache, blob):
                    return None
                continue
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ESTALE):
                    raise
                break
            # The file was cut short after it was opened.
            if len(data) < size:
                break
            cache.use(blob.sha256)
            return data
        else:
            return None
        self._drop(cache, blob)
        return None

    def _fetch(self, cache: Cache, blob: Blob) -> bool:
        """Brings the file into the cache; returns False where it has no room.

        Threads that need the same file share one attempt and its error, so that an unreachable store costs the time of
        one.
        """
        with self._lock:
            if time.monotonic() < self._full_until:
                return False
            future = self._fetching.get(blob.sha256)
            is_mine = future is None
            if future is None:
                future = self._fetching[blob.sha256] = Future()
        if is_mine:
            try:
                has_room = cache.fetch(
                    blob.sha256,
                    blob.bytes,
                    lambda descriptor: self._download(blob, descriptor),
                )
                if not has_room:
                    self._full_until = time.monotonic() + FULL_PAUSE_S
                future.set_result(has_room)
            except BaseException as error:
                future.set_exception(error)
            finally:
                del self._fetching[blob.sha256]
            # Evicted files take disk space for as long as they are open.
            self._cached.close(only=lambda descriptor: os.fstat(descriptor).st_nlink == 0)
        return future.result()

    def _download(self, blob: Blob, descriptor: int) -> None:
        """Writes the whole file, and checks its digest."""
        assert isinstance(self._origin, Remote)
        origin = self._origin

        def attempt() -> None:
            digest = hashlib.sha256()
            offset = 0
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.seek(0)
                while offset < blob.bytes:
                    if self._closed:
                        raise StoreError(f"{self.url(blob.name)}: closed while it was being fetched")
                    # Each range of a server that ignores ranges costs the whole file.
                    size = BLOCK_BYTES if origin.honours_ranges else blob.bytes
                    block = self._from_origin(blob, offset, min(size, blob.bytes - offset))
                    digest.update(block)
                    offset += file.write(block)
            _compare(digest.hexdigest(), blob)

        self._retry(self.url(blob.name), attempt, on=WrongBytes)

    def _from_origin(self, blob: Blob, offset: int, size: int) -> bytes:
        try:
            return self._origin.pread(blob, offset, size)
        except FileNotFoundError:
            raise StoreError(f"{self.url(blob.name)}: no such file, but the data set lists it") from None

    def _open_cached(self, blob: Blob) -> int:
        assert self._cache
        return self._cache.open(blob.sha256, blob.bytes)

    def _drop(self, cache: Cache, blob: Blob) -> None:
        descriptor = self._cached.pop(blob)
        cache.discard(blob.sha256, descriptor)
        if descriptor is not None:
            os.close(descriptor)


def _compare(sha256: str, blob: Blob) -> None:
    if sha256 != blob.sha256:
        raise WrongBytes(f"its SHA-256 is {sha256} instead of {blob.sha256}")
