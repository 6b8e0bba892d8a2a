"""Writing files so that they are whole under their name or absent, even after a power cut."""

import os
from pathlib import Path


def write(path: Path, data: bytes | memoryview) -> None:
    """Write under another name, sync, rename, and sync the folder. The mode is what the umask allows."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder outlast a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
