"""Files below a folder, and the one rule by which hidden and system entries are ignored: in trees, tars and buckets.

    folder ──files_below──▶ paths of files, links followed
                  └───────▶ ignored entries, whose number is reported

Whoever made them, they are no part of a data set: thumbnails, copies of editors, folders of storage systems.
"""

import os
import sys
from collections.abc import Iterator, Sequence

from pipeline.errors import InputError

_SYSTEM = frozenset(
    {
        *("__macosx", "icon\r"),  # macOS
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
        *("lost+found", "~snapshot", "#snapshot", "#recycle", "@eadir", "@recycle", "@recently-snapshot"),  # storage
        "__pycache__",
    }
)


def is_system(path: str) -> bool:
    """Whether a part of the path is hidden, or made by an operating system, a storage system or an editor."""
    return any(map(_is_system_name, path.split("/")))


def _is_system_name(name: str) -> bool:
    name = name.lower()
    is_hidden = name.startswith(".") and name not in (".", "..")
    is_editors = name.endswith("~") or name.startswith("~$") or (name.startswith("#") and name.endswith("#"))
    return is_hidden or is_editors or name in _SYSTEM or name.endswith(":zone.identifier")


def files_below(folder: str, ignored: list[str]) -> Iterator[str]:
    """Every file below a folder, sorted by name in each folder, links followed. Hidden and system entries go to
    `ignored`. Raises InputError where a folder cannot be read."""
    yield from _files_below(folder, ignored, ())


def _files_below(folder: str, ignored: list[str], above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    for entry in entries_of(folder, ignored):
        if is_folder(entry):
            yield from _files_below(entry.path, ignored, (*above, real))
        else:
            yield entry.path


def entries_of(folder: str, ignored: list[str]) -> list[os.DirEntry[str]]:
    """A folder's entries, sorted by name. Hidden and system ones go to `ignored`. Raises InputError."""
    try:
        with os.scandir(folder) as found:
            everything = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}; make it readable or remove it") from error
    ignored += [entry.path for entry in everything if is_system(entry.name)]
    return [entry for entry in everything if not is_system(entry.name)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. False for a link that leads nowhere or to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112  # takes the path


def report_ignored(ignored: Sequence[str]) -> None:
    if ignored:
        print(f"ignored {len(ignored)} hidden and system entries, the first is {ignored[0]!r}", file=sys.stderr)
