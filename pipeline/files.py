"""Reads files up to a size, and writes them so that they are whole under their name or absent, even after a power cut.

Also here: folders of one user, and what not all file systems have, locks and hard links.
"""

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InputError

_MISSING = (errno.ENOSYS, errno.EOPNOTSUPP)
_NO_LOCKS = (errno.ENOLCK, *_MISSING)
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, *_MISSING)

MAX_DOCUMENT_BYTES = 4 << 20
"""Of a file of settings, notes or results, which is read whole."""


class UnreadableError(OSError):
    """The file is too large, or no regular file: trying again does not help."""


def read(path: str | Path, most_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Returns a whole file. Raises OSError for one that is larger than `most_bytes`, and as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b""
        # Python reserves as much memory as is asked for, so only as much is asked for as the file says that it has.
        while size <= most_bytes and (block := file.read(size - len(data) + 1)):
            data += block
            size = max(size, len(data))
    if size > most_bytes:
        raise UnreadableError(errno.EFBIG, f"more than {most_bytes:,} bytes", str(path))
    return data


def open_regular(path: str | Path) -> int:
    """Opens a file and returns its descriptor, for reading.

    Raises OSError, also for what is no regular file: a pipe may never give a byte, and a device gives them without end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe's writer is not waited for
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    code, why = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")
    raise UnreadableError(code, why, str(path))


def write(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Writes under another name, syncs, renames, and syncs the folder.

    The mode is what the umask allows, or 0600 for a `private` file, which may hold a secret.
    """
    partial = path.with_name(f".{path.name}.partial")
    if private:  # made anew: an older one may be open to others
        partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
    with os.fdopen(descriptor, "wb") as file:
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


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, mode: int = 0o666) -> Iterator[int]:
    """Locks a file, made when missing, against other threads and processes; yields its descriptor.

    Raises BlockingIOError where another one does and this is not to `wait`, and InputError on a file system without
    locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)  # NFS locks only what may be written
        try:
            _flock(descriptor, path, wait=wait)
            if is_at(descriptor, path):  # else whoever had the lock has renamed or removed the file
                yield descriptor
                return
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to children that were forked meanwhile
            os.close(descriptor)


def _flock(descriptor: int, path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise InputError(
            f"{path}: its file system has no locks ({error.strerror}): mount it with them (Lustre: -o flock; NFS: with "
            "its lock manager), or choose a folder on another one"
        ) from error


def is_at(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy where the file system permits none, which is reported once for each folder."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _say_copied(target.parent.parent, error.strerror)
        shutil.copyfile(source, target)


@functools.cache
def _say_copied(folder: Path, why: str) -> None:
    remedy = "choose a folder on a file system with hard links to save the room"
    print(f"warning: {folder}: hard links are refused ({why}), so files are copied: {remedy}", file=sys.stderr)


def claim(path: Path, data: bytes) -> None:
    """Writes a file unless there is one. Of several processes that do at once one succeeds; the file is whole as soon
    as it has its name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        whole = Path(scratch, "claim", "whole")
        whole.parent.mkdir()
        write(whole, data, private=True)
        try:
            os.link(whole, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Without hard links a folder decides: renaming onto a name fails where a folder that is not empty has it.
            first = path.with_name(f".{path.name}.first")
            with contextlib.suppress(OSError):
                whole.parent.rename(first)
            copy = Path(scratch, "copy")
            write(copy, (first / "whole").read_bytes(), private=True)
            copy.rename(path)


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
