"""Caches remote files on this node's disk, shared by all processes of a user, within a budget of bytes.

    FOLDER/SHA256           a whole file, verified before it got this name; its mtime is its last use
    FOLDER/SHA256.partial   a file in transfer, locked by the process that fetches it, at its full size from the start
    FOLDER/ledger           locked while files are evicted; holds an upper bound of the bytes in use

Files are identified by their digest, so data sets and URLs share them. All state is in the folder, and the sizes of its
files are the truth: a process may die at any instant, the kernel frees its locks, and what it left is overwritten or
removed.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.errors import InputError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
_OURS = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL)})?")
_LEDGER_DIGITS = 20


class CacheOptions(NamedTuple):
    """`data.cache` and `data.cache_gb` of a run, or a command's --cache and --cache-gb. None: see `Cache.default`."""

    folder: str | None = None
    gb: float | None = None


DEFAULT_CACHE = CacheOptions()


class Cache:
    """The cache in `folder`, which should be on a disk of this node, with files of up to `budget_bytes` in total.

    A file that any process has used within the last `in_use_s` seconds is not evicted. Raises InputError where the
    folder cannot be used.
    """

    def __init__(self, folder: str | Path, budget_bytes: int, *, in_use_s: float = 60.0):
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes
        self.in_use_s = in_use_s
        # When this process last updated the mtime of each file.
        self._used_at: dict[str, float] = {}
        self._reported: set[str] = set()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.locked(self._ledger, mode=0o600):
                pass
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be used as a cache: {error.strerror}; "
                "choose a folder on a local disk, where files can be written and locked"
            ) from error

    @classmethod
    def default(cls, folder: str | Path | None = None, budget_bytes: int | None = None) -> "Cache":
        """Returns the cache in `folder`, in which variables such as $SLURM_TMPDIR have their values on this node.

        Without `folder`, the cache is in a private folder below $TMPDIR (or /tmp). Without `budget_bytes`, the budget
        is half of the free space there, the cache's files counted as free. Raises InputError where a variable has no
        value, and where somebody else owns the private folder.
        """
        if folder is None:
            folder = files.private_folder("pvt-shards")
        else:
            folder = os.path.expandvars(folder)
            if "$" in folder:
                raise InputError(
                    f"{folder}: names a variable that has no value here: set it, or choose another cache folder"
                )
        cache = cls(folder, budget_bytes or 0)
        if budget_bytes is None:
            taken = sum(status.st_size for _, status in _entries(cache.folder))
            cache.budget_bytes = (shutil.disk_usage(cache.folder).free + taken) // 2
        return cache

    @property
    def _ledger(self) -> Path:
        return self.folder / "ledger"

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def open(self, sha256: str, num_bytes: int) -> int:
        """Returns a descriptor for reading, which stays valid when the file is evicted.

        Raises FileNotFoundError where there is no such file, or one of another size, which is discarded.
        """
        descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(descriptor).st_size != num_bytes:
            self.discard(sha256, descriptor)
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "discarded: wrong size", str(self.path(sha256)))
        return descriptor

    def use(self, sha256: str) -> bool:
        """Marks the file as used, and returns whether it is cached. Fast enough to be called for each sample."""
        now = time.monotonic()
        # The mtime need not be exact: a system call for each sample would cost more.
        if now - self._used_at.get(sha256, -1e9) < self.in_use_s / 10:
            return True
        try:
            os.utime(self.path(sha256))
        except OSError:
            return False
        if len(self._used_at) > 10_000:
            self._used_at.clear()
        self._used_at[sha256] = now
        return True

    def fetch(self, sha256: str, num_bytes: int, download: Callable[[int], None]) -> bool:
        """Fetches a file into the cache. Returns False without room, because all files are in use or the disk is full.

        `download` writes the verified contents to a descriptor. Its exceptions are passed on, OSError excepted. Other
        processes that need the same file wait meanwhile.
        """
        if num_bytes > self.budget_bytes:
            self._report_full(num_bytes)
            return False
        try:
            return self._fetch(sha256, num_bytes, download)
        except OSError as error:
            self._report("error", f"{error.strerror or error}; samples are read from their origin instead: slower")
            return False

    def _fetch(self, sha256: str, num_bytes: int, download: Callable[[int], None]) -> bool:
        path = self.path(sha256)
        partial = path.with_name(path.name + PARTIAL)
        with files.locked(partial, mode=0o600) as descriptor:
            renamed = False
            try:
                # Another process may have fetched the file while this one waited for the lock.
                with contextlib.suppress(FileNotFoundError):
                    os.close(self.open(sha256, num_bytes))
                    return True
                os.ftruncate(descriptor, 0)
                if not self._reserve(descriptor, num_bytes):
                    self._report_full(num_bytes)
                    return False
                download(descriptor)
                os.utime(descriptor)
                # With the ledger locked, so that no process counts the file twice or not at all.
                with files.locked(self._ledger, mode=0o600):
                    partial.rename(path)
                renamed = True
                log.debug(f"cache {self.folder}: fetched {sha256}, {num_bytes:,} bytes")
                return True
            finally:
                # Once renamed, another process may have begun a new partial file.
                if not renamed:
                    partial.unlink(missing_ok=True)

    def discard(self, sha256: str, descriptor: int | None = None) -> None:
        """Removes the file; with a descriptor, only if that is still the file at this path."""
        path = self.path(sha256)
        self._used_at.pop(sha256, None)
        if descriptor is None or files.is_at(descriptor, path):
            path.unlink(missing_ok=True)

    def _reserve(self, descriptor: int, num_bytes: int) -> bool:
        """Gives an empty partial file its full size, if that fits into the budget after evicting idle files."""
        with files.locked(self._ledger, mode=0o600) as ledger:
            text = os.pread(ledger, _LEDGER_DIGITS, 0)
            used = int(text) if text.isdigit() else None
            if used is None or used + num_bytes > self.budget_bytes:
                # A little more than needed: with many small files, not every one has to count them all.
                used = self._evict(num_bytes, spare=self.budget_bytes // 256)
            fits = used + num_bytes <= self.budget_bytes
            if fits:
                used += num_bytes
            # Written before the file grows: a process that dies in between leaves the bound too high, never too low.
            os.pwrite(ledger, f"{used:0{_LEDGER_DIGITS}}".encode(), 0)
            if fits:
                os.ftruncate(descriptor, num_bytes)
            return fits

    def _evict(self, num_bytes: int, spare: int) -> int:
        """Removes idle files, the least recently used first, so that `num_bytes` and some `spare` fit.

        Removes none where `num_bytes` cannot fit. Returns the bytes still in use. Called with the ledger locked.
        """
        now = time.time()
        used = 0
        idle = []
        for name, status in _entries(self.folder):
            is_partial = name.endswith(PARTIAL)
            if is_partial and _remove_abandoned(self.folder / name):
                continue
            used += status.st_size
            # A time in the future comes from a clock that was set back, and protects nothing.
            is_in_use = 0 <= now - status.st_mtime < self.in_use_s
            if not is_partial and not is_in_use:
                idle.append((status.st_mtime, name, status.st_size))
        idle_bytes = sum(size for _, _, size in idle)
        if used - idle_bytes + num_bytes > self.budget_bytes:
            return used
        for _, name, size in sorted(idle):
            if used + max(num_bytes, spare) <= self.budget_bytes:
                break
            self.path(name).unlink(missing_ok=True)
            used -= size
        return used

    def _report_full(self, num_bytes: int) -> None:
        # A budget of 0 means that nothing is to be cached.
        if self.budget_bytes > 0:
            self._report(
                "full",
                f"its budget of {_format_gib(self.budget_bytes)} is in use and has no room for a file of "
                f"{_format_gib(num_bytes)}; samples are read from their origin instead: slower. Raise the cache's "
                "budget to more than the shards that this node's ranks read at a time",
            )

    def _report(self, kind: str, text: str) -> None:
        """Reports each kind of problem once."""
        if kind not in self._reported:
            self._reported.add(kind)
            log.warning(f"cache {self.folder}: {text}")


def _format_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields the names and states of the cache's files, whole and partial."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)


def _remove_abandoned(partial: Path) -> bool:
    """Removes a partial file if no process is writing it, and returns whether it did."""
    with contextlib.suppress(OSError), files.locked(partial, wait=False, mode=0o600):
        partial.unlink()
        return True
    return False
