"""Writing files so that they are whole under their name or absent, even after a power cut; folders of one user."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from pipeline.errors import InputError


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


def private_folder(name: str) -> Path:
    """A folder of this user's alone below $TMPDIR (or /tmp), made when missing: NAME and the user's number.

    Raises InputError where somebody else has it or could write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(
            f"{folder}: not a private folder of yours ({stat.filemode(status.st_mode)}, owner {status.st_uid}), "
            "so what is in it cannot be trusted: remove it, or set TMPDIR to another folder"
        )
    return folder
