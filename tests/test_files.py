"""Reading files that may be anything."""

import os
import tracemalloc
from pathlib import Path

import pytest

from pipeline import files


def test_reading_small_file_takes_little_memory_whatever_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        assert files.read(tmp_path / "file", 1 << 30) == b"x" * 1000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_file_above_size_limit_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert len(files.read(tmp_path / "file", 1000)) == 1000
    with pytest.raises(OSError, match="more than 999 bytes"):
        files.read(tmp_path / "file", 999)
    assert files.read("/proc/self/status")  # whose size is said to be 0


def test_non_regular_file_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            files.read(path)
    with pytest.raises(OSError, match="Is a directory"):
        files.read(tmp_path)
