"""Digest-checked copies of model versions on this machine, shared by concurrent jobs and readable by the group.

    FOLDER/KEY/            a version's files; KEY is the SHA-256 of their registered digests
    FOLDER/KEY.partial/    a copy that the holder of the lock is making; one that a killed process left is replaced
    FOLDER/KEY.lock

A copy is hashed again each time it is requested, so that later damage on the disk is noticed. Its files and folders are
read-only, so that nothing is added to it by mistake. Copies may be removed whenever no job is starting.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline import files
from pipeline.config import fingerprint
from pipeline.errors import ExternalError, InputError
from pipeline.track.registry.model_files import FileMismatch, mismatches

log = logging.getLogger(__name__)

VARIABLE = "PVT_MODEL_CACHE"


def folder_of(cache: Path | None) -> Path:
    """Returns `cache`, or $PVT_MODEL_CACHE, or pvt-pipeline/models below $XDG_CACHE_HOME or ~/.cache."""
    if chosen := cache or os.environ.get(VARIABLE):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "pvt-pipeline" / "models"


def obtain(
    registered: Mapping[str, str],
    num_bytes: int,
    download: Callable[[Path], None],
    refuse: Callable[[list[FileMismatch]], Exception],
    cache: Path | None,
) -> Path:
    """Returns a folder whose files are exactly those of `registered`, SHA-256 by path.

    `num_bytes`: size of all files, 0 if unknown. `download` fills an empty folder. Raises the error that `refuse`
    returns for mismatches in the download, InputError where the cache cannot be written, and ExternalError where the
    disk is full.
    """
    folder = folder_of(cache)
    copy = folder / fingerprint(dict(registered))
    with _explain_os_errors(folder):
        if copy.is_dir() and not mismatches(registered, copy, num_bytes):
            log.debug(f"{copy}: already here, all {len(registered)} files are as registered")
            return copy
        _make_folder(folder)
        with files.locked(folder / f"{copy.name}.lock", mode=0o644):
            if copy.is_dir():
                # Another process may have made it while this one waited for the lock.
                if not mismatches(registered, copy, num_bytes):
                    return copy
                log.warning(f"{copy}: this copy was damaged on the disk; it is made anew")
            partial = folder / f"{copy.name}.partial"
            try:
                _fill(partial, num_bytes, download)
                if faults := mismatches(registered, partial, num_bytes):
                    raise refuse(faults)
                _protect(partial)
                _replace(copy, partial)
            finally:
                _remove(partial)
    return copy


def _fill(partial: Path, num_bytes: int, download: Callable[[Path], None]) -> None:
    # A killed process may have left it.
    _remove(partial)
    if shutil.disk_usage(partial.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed, {os.strerror(errno.ENOSPC)}")
    partial.mkdir()
    download(partial)


def _protect(folder: Path) -> None:
    """Makes a folder readable by the group and read-only for everybody."""
    for path in [folder, *folder.rglob("*")]:
        _open_to_group(path)
        path.chmod(path.stat().st_mode & ~0o222)


def _remove(folder: Path) -> None:
    """Removes a folder as far as possible."""
    # Nothing can be removed from a read-only folder.
    with contextlib.suppress(OSError):
        for parent, _, _ in os.walk(folder):
            Path(parent).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _replace(copy: Path, partial: Path) -> None:
    """Gives the partial copy its name, after a damaged one was moved aside."""
    # Moved as a whole, because another process may be reading it.
    aside = copy.with_name(f"{copy.name}.damaged")
    _remove(aside)
    with contextlib.suppress(FileNotFoundError):
        copy.rename(aside)
    partial.rename(copy)
    _remove(aside)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _open_to_group(path)


def _open_to_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | (0o050 if path.is_dir() else 0o040))


@contextlib.contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        elsewhere = f"name another folder in {VARIABLE}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExternalError(
                f"{folder}: no room for a copy of the model: {error.strerror}; make room, or {elsewhere}"
            ) from error
        raise InputError(f"{folder}: cannot hold copies of models: {error}; {elsewhere}") from error
