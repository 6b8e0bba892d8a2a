"""Files kept open for reading at any offset."""

import os
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Descriptors(Generic[Key]):
    """Files open for `os.pread`, the least recently used closed: without a seek position, any number of threads share
    one descriptor."""

    def __init__(self, opener: Callable[[Key], int], max_open: int = 256):
        self._opener = opener
        self._max_open = max_open
        self._open: dict[Key, int] = {}
        self._lock = threading.Lock()

    def pread(self, key: Key, offset: int, size: int) -> bytes:
        """`size` bytes, fewer where the file ends before. Raises OSError."""
        with self._lock:
            # Duplicated under the lock, because another thread may close the descriptor while this one reads.
            descriptor = os.dup(self._get(key))
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _get(self, key: Key) -> int:
        if key in self._open:
            self._open[key] = self._open.pop(key)  # most recently used goes last
        else:
            while len(self._open) >= self._max_open:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[key] = self._opener(key)
        return self._open[key]

    def pop(self, key: Key) -> int | None:
        """The descriptor, if there is one, for the caller to close."""
        with self._lock:
            return self._open.pop(key, None)

    def close(self, only: Callable[[int], bool] = lambda descriptor: True) -> None:
        with self._lock:
            for key in [key for key, descriptor in self._open.items() if only(descriptor)]:
                os.close(self._open.pop(key))
