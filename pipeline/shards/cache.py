"""Copies of remote files on this node's disk, shared by all processes of a user, under a budget of bytes.

    FOLDER/SHA256           a whole file, verified before it got this name; its mtime is its last use
    FOLDER/SHA256.partial   a file on its way, locked by whoever fetches it, at its full size from the start
    FOLDER/ledger           locked while room is made; holds an upper bound of the bytes taken

Files are known by their digest, so data sets and URLs share. All state is in the folder, and the sizes of its files are
the truth: a process may die at any instant, the kernel frees its locks, and what it left is overwritten or removed.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.errors import InputError

PARTIAL = ".partial"
_OURS = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL)})?")
_LEDGER_DIGITS = 20


class CacheOptions(NamedTuple):
    """`data.cache` and `data.cache_gb` of a run, or a command's --cache and --cache-gb. None: as `Cache.default`."""

    folder: str | None = None
    gb: float | None = None


DEFAULT_CACHE = CacheOptions()


class Cache:
    """`budget_bytes` bounds the files in `folder`, which should be on a disk of this node. A file used within the last
    `in_use_s` seconds, by any process, is not evicted.

    Raises InputError where the folder cannot be used.
    """

    def __init__(self, folder: str | Path, budget_bytes: int, *, in_use_s: float = 60.0):
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes
        self.in_use_s = in_use_s
        self._used_at: dict[str, float] = {}  # when this process last said so
        self._said: set[str] = set()
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
        """Without a folder, a private one below $TMPDIR (or /tmp); without a budget, half of what is free there,
        counting what the cache already holds. Variables such as $SLURM_TMPDIR in `folder` mean what they do on
        this node. Raises InputError where one has no value, and where somebody else owns the private folder."""
        place = files.private_folder("pvt-shards") if folder is None else os.path.expandvars(folder)
        if "$" in str(place):
            raise InputError(
                f"{place}: names a variable that has no value here: set it, or choose another cache folder"
            )
        cache = cls(place, budget_bytes or 0)
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
        """A descriptor for reading, which stays good when the file is evicted. A file of another size is discarded.

        Raises FileNotFoundError where there is none.
        """
        descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(descriptor).st_size != num_bytes:
            self.discard(sha256, descriptor)
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "discarded: wrong size", str(self.path(sha256)))
        return descriptor

    def use(self, sha256: str) -> bool:
        """Put off eviction, and say whether the file is here. Nearly free when called for each sample."""
        now = time.monotonic()
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
        """Have the file here: False where there is no room, because all is in use or the disk is full.

        `download` writes the verified contents to a descriptor; what it raises, but for OSError, is passed on. Others
        who want the same file wait meanwhile.
        """
        if num_bytes > self.budget_bytes:
            self._say_full(num_bytes)
            return False
        try:
            return self._fetch(sha256, num_bytes, download)
        except OSError as error:
            self._say("error", f"{error.strerror or error}; samples are read from their origin instead: slower")
            return False

    def _fetch(self, sha256: str, num_bytes: int, download: Callable[[int], None]) -> bool:
        path = self.path(sha256)
        partial = path.with_name(path.name + PARTIAL)
        with files.locked(partial, mode=0o600) as descriptor:
            renamed = False
            try:
                with contextlib.suppress(FileNotFoundError):  # else another process has been faster
                    os.close(self.open(sha256, num_bytes))
                    return True
                os.ftruncate(descriptor, 0)
                if not self._reserve(descriptor, num_bytes):
                    self._say_full(num_bytes)
                    return False
                download(descriptor)
                os.utime(descriptor)
                with files.locked(self._ledger, mode=0o600):  # nobody may be counting
                    partial.rename(path)
                renamed = True
                return True
            finally:
                # Once renamed, another process may have begun a new partial file.
                if not renamed:
                    partial.unlink(missing_ok=True)

    def discard(self, sha256: str, descriptor: int | None = None) -> None:
        """Remove the file; with a descriptor only if that is the file, and not one that has replaced it since."""
        path = self.path(sha256)
        self._used_at.pop(sha256, None)
        if descriptor is None or files.is_at(descriptor, path):
            path.unlink(missing_ok=True)

    def _reserve(self, descriptor: int, num_bytes: int) -> bool:
        """Give an empty partial file its full size, if that fits into the budget after evicting what is idle."""
        with files.locked(self._ledger, mode=0o600) as ledger:
            text = os.pread(ledger, _LEDGER_DIGITS, 0)
            taken = int(text) if text.isdigit() else None
            if taken is None or taken + num_bytes > self.budget_bytes:
                # A little more than needed: with many small files, not every one has to count them all.
                taken = self._evict(num_bytes, spare=self.budget_bytes // 256)
            fits = taken + num_bytes <= self.budget_bytes
            # Written before the file grows: a process that dies in between leaves the bound too high, never too low.
            os.pwrite(ledger, f"{taken + num_bytes * fits:0{_LEDGER_DIGITS}}".encode(), 0)
            if fits:
                os.ftruncate(descriptor, num_bytes)
            return fits

    def _evict(self, num_bytes: int, spare: int) -> int:
        """Remove idle files, the least recently used first, for `num_bytes` and some `spare` to fit, or none where
        `num_bytes` cannot. Returns the bytes still taken. Called with the ledger locked."""
        now = time.time()
        taken, idle = 0, []
        for name, status in _entries(self.folder):
            is_partial = name.endswith(PARTIAL)
            if is_partial and _remove_dead(self.folder / name):
                continue
            taken += status.st_size
            if not is_partial and not 0 <= now - status.st_mtime < self.in_use_s:
                idle.append((status.st_mtime, name, status.st_size))
        if taken - sum(size for _, _, size in idle) + num_bytes > self.budget_bytes:
            return taken
        for _, name, size in sorted(idle):
            if taken + max(num_bytes, spare) <= self.budget_bytes:
                break
            self.path(name).unlink(missing_ok=True)
            taken -= size
        return taken

    def _say_full(self, num_bytes: int) -> None:
        if self.budget_bytes > 0:  # 0 asks for it
            self._say(
                "full",
                f"its budget of {_gib(self.budget_bytes)} is in use and has no room for a file of {_gib(num_bytes)}; "
                "samples are read from their origin instead: slower. Raise the cache's budget to more than the shards "
                "that this node's ranks read at a time",
            )

    def _say(self, kind: str, text: str) -> None:
        """Once for each kind of trouble."""
        if kind not in self._said:
            self._said.add(kind)
            print(f"warning: cache {self.folder}: {text}", file=sys.stderr, flush=True)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names and states of the cache's files, whole and partial."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)


def _remove_dead(partial: Path) -> bool:
    """Remove a partial file if nobody is writing it."""
    with contextlib.suppress(OSError), files.locked(partial, wait=False, mode=0o600):
        partial.unlink()
        return True
    return False
