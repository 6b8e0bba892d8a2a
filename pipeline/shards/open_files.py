"""Keeps files open for reading at any offset.

key ──pread──▶ open descriptor, or the opener's ──▶ bytes
"""

import os
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Descriptors(Generic[Key]):
    """Descriptors of files that are open for `os.pread`; the least recently used ones are closed.

    pread has no seek position, so any number of threads share one descriptor.
    """

    def __init__(self, opener: Callable[[Key], int], max_open: int = 256):
        self._opener = opener
        self._max_open = max_open
        self._open: dict[Key, int] = {}
        self._lock = threading.Lock()

    def pread(self, key: Key, offset: int, size: int) -> bytes:
        """Returns `size` bytes, or fewer at the end of the file. Raises OSError."""
        with self._lock:
            # Duplicated under the lock, because another thread may close the descriptor while this one reads.
            descriptor = os.dup(self._get(key))
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _get(self, key: Key) -> int:
        descriptor = self._open.pop(key, None)
        if descriptor is None:
            while len(self._open) >= self._max_open:
                oldest = next(iter(self._open))
                os.close(self._open.pop(oldest))
            descriptor = self._opener(key)
        # The most recently used key goes last: dictionaries keep the order of insertion.
        self._open[key] = descriptor
        return descriptor

    def pop(self, key: Key) -> int | None:
        """Removes a descriptor and returns it for the caller to close; None where there is none."""
        with self._lock:
            return self._open.pop(key, None)

    def close(self, only: Callable[[int], bool] = lambda descriptor: True) -> None:
        """Closes all descriptors, or those for which `only` returns True."""
        with self._lock:
            for key, descriptor in list(self._open.items()):
                if only(descriptor):
                    del self._open[key]
                    os.close(descriptor)
