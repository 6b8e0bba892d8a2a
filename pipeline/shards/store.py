"""Bytes of samples, read by offset from the shards of a folder."""

import os
import threading
import zlib
from pathlib import Path

from pipeline.shards.index import ShardSet


class CorruptSampleError(RuntimeError):
    """A sample's bytes are not those that were packed."""


class ShardStore:
    """Reads samples with `os.pread`: no seek position, so any number of threads share one descriptor a shard."""

    def __init__(self, shards: ShardSet, max_open: int = 256):
        self.shards = shards
        self._max_open = max_open
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of a sample. Raises CorruptSampleError when its checksum differs from the index."""
        record = self.shards.index(shard)[row]
        path = self.shards.tar(self.shards.manifest.shards[shard].name)
        with self._lock:
            # Duplicated under the lock, because another thread may close the descriptor while this one reads.
            descriptor = os.dup(self._descriptor(path))
        try:
            data = os.pread(descriptor, int(record["size"]), int(record["offset"]))
        finally:
            os.close(descriptor)
        if zlib.crc32(data) != record["crc32"]:
            raise CorruptSampleError(
                f"{path}: sample {self.shards.key(shard, row)!r} (row {row}) does not match its checksum: "
                "the shard was damaged after packing; restore it from its source"
            )
        return data

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open[path] = self._open.pop(path)  # most recently used goes last
        else:
            while len(self._open) >= self._max_open:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])
