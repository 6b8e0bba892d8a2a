"""Reads files up to a size, and writes them so that they are whole under their name or absent, even after a power cut.

The module also has digests, private folders, and locks and hard links, which not every file system supports.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InputError

log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP)
_NO_LOCKS = (errno.ENOLCK, *_UNSUPPORTED)
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, *_UNSUPPORTED)

MAX_DOCUMENT_BYTES = 4 << 20
"""The limit for a file of settings, notes or results, which is read whole."""


class UnreadableError(OSError):
    """The file is too large, or no regular file: trying again does not help."""


def read(path: str | Path, most_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Returns a whole file. Raises OSError for one that is larger than `most_bytes`, and as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b""
        # Python reserves as much memory as it is asked to read, so it is asked for the file's stated size, not for the
        # limit. One byte more shows whether the file is longer than it states, as files in /proc are.
        while size <= most_bytes:
            block = file.read(size - len(data) + 1)
            if not block:
                break
            data += block
            size = max(size, len(data))
    if size > most_bytes:
        raise UnreadableError(errno.EFBIG, f"more than {most_bytes:,} bytes", str(path))
    return data


def open_regular(path: str | Path) -> int:
    """Opens a file for reading and returns its descriptor.

    Raises OSError, and UnreadableError for anything but a regular file: a pipe may never deliver a byte, and a device
    may deliver them without end.
    """
    # O_NONBLOCK: opening a pipe does not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise UnreadableError(errno.EISDIR, "Is a directory", str(path))
    raise UnreadableError(errno.EINVAL, "not a regular file", str(path))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's contents in hexadecimal. Raises OSError as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Writes a file under a temporary name, syncs it, renames it, and syncs the folder.

    The mode is what the umask allows, or 0600 for a `private` file, which may hold a secret.
    """
    partial = partial_of(path)
    # A private file is created anew, because others may be allowed to read what an interrupted call has left.
    if private:
        partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


class HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written, and is on the disk when it is closed."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._sha256.update(data)
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
        super().close()


def partial_of(path: Path) -> Path:
    """Returns the path at which a file or folder is made before it is renamed to `path`."""
    return path.with_name(f".{path.name}.partial")


def replace(path: Path, text: str) -> None:
    """Writes a file so that others never read half of it, without the wait of `write`: a power cut may lose it."""
    partial = partial_of(path)
    partial.write_text(text)
    partial.rename(path)


@contextlib.contextmanager
def output(out: Path) -> Iterator[Path]:
    """Yields where to write a file that a command was asked for. It gets the name `out` at the end of the block.

    The path is of this call alone, because two commands may write the same file at once. Raises InputError where the
    file cannot be written.
    """
    partial = out.with_name(f".{out.stem}.{uuid.uuid4().hex[:12]}{out.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; name another file") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def require_empty(out: Path) -> None:
    """Raises InputError where a command's output would be put to something that is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something; give an empty or a new folder to --out")


def sync_folder(path: Path) -> None:
    """Makes what was created, renamed or removed in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, mode: int = 0o666) -> Iterator[int]:
    """Locks a file against other threads and processes, and yields its descriptor. A missing file is created.

    Without `wait`, raises BlockingIOError where the file is locked already. Raises InputError on a file system without
    locks.
    """
    while True:
        # Opened for writing, because NFS locks only what may be written.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            _flock(descriptor, path, wait=wait)
            # If the previous holder has renamed or removed the file, this lock protects nothing: try again.
            if is_at(descriptor, path):
                yield descriptor
                return
        finally:
            # Unlocked explicitly, because children that were forked meanwhile have the descriptor, and the lock, too.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _flock(descriptor: int, path: Path, *, wait: bool) -> None:
    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise InputError(
            f"{path}: its file system has no locks ({error.strerror}): mount it with them (Lustre: -o flock; NFS: with "
            "its lock manager), or choose a folder on another one"
        ) from error


def is_at(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy where the file system permits no links, which is reported once for each folder."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _report_copied(target.parent.parent, error.strerror)
        shutil.copyfile(source, target)


@functools.cache
def _report_copied(folder: Path, reason: str) -> None:
    remedy = "choose a folder on a file system with hard links to save disk space"
    log.warning(f"{folder}: hard links are refused ({reason}), so files are copied: {remedy}")


def claim(path: Path, data: bytes) -> None:
    """Writes a file unless it exists. Of several processes that call this at once, one succeeds.

    The file is whole as soon as it has its name.
    """
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
            # Without hard links a folder decides who is first: renaming onto a folder that is not empty fails.
            first = path.with_name(f".{path.name}.first")
            with contextlib.suppress(OSError):
                whole.parent.rename(first)
            copy = Path(scratch, "copy")
            write(copy, (first / "whole").read_bytes(), private=True)
            copy.rename(path)


def private_folder(name: str) -> Path:
    """Returns a folder below $TMPDIR (or /tmp) that only this user can access, NAME-UID, and creates it when missing.

    Raises InputError where somebody else owns the folder or could read or write it.
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
