"""Lists the files below a folder, and decides which hidden and system entries are ignored, also in tars and buckets.

    folder ──files_below──▶ paths of files, links followed
                  └───────▶ ignored entries, whose number is reported

Ignored entries never belong to a data set: thumbnails, backup copies of editors, folders of storage systems.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.errors import InputError
from pipeline.shards.labels import UNLABELLED_REMEDY

log = logging.getLogger(__name__)

_SYSTEM = frozenset(
    {
        # macOS
        "__macosx",
        "icon\r",
        # Windows
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        # Storage systems
        "lost+found",
        "~snapshot",
        "#snapshot",
        "#recycle",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        # Python
        "__pycache__",
    }
)


def is_system(path: str) -> bool:
    """Returns whether a component of the path is hidden, or belongs to an operating or storage system or an editor."""
    return any(map(_is_system_name, path.split("/")))


def _is_system_name(name: str) -> bool:
    name = name.lower()
    is_hidden = name.startswith(".") and name not in (".", "..")
    # Emacs and vi append ~, Office prepends ~$, and Emacs encloses unsaved text in #.
    is_editors = name.endswith("~") or name.startswith("~$") or (name.startswith("#") and name.endswith("#"))
    # Windows' note that a file was downloaded, as Linux shows it.
    is_note = name.endswith(":zone.identifier")
    return is_hidden or is_editors or is_note or name in _SYSTEM


def files_below(folder: str, ignored: list[str]) -> Iterator[str]:
    """Yields the path of every file below a folder, sorted by name in each folder; links are followed.

    Hidden and system entries go to `ignored`. Raises InputError where a folder cannot be read.
    """
    yield from _files_below(folder, ignored, ())


def _files_below(folder: str, ignored: list[str], above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    # A link that leads back up would go round in circles.
    if real in above:
        return
    for entry in entries_of(folder, ignored):
        if is_folder(entry):
            yield from _files_below(entry.path, ignored, (*above, real))
        else:
            yield entry.path


def entries_of(folder: str, ignored: list[str]) -> list[os.DirEntry[str]]:
    """Returns a folder's entries, sorted by name. Hidden and system entries go to `ignored`.

    Raises InputError where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}; make it readable or remove it") from error
    kept = []
    for entry in entries:
        if is_system(entry.name):
            ignored.append(entry.path)
        else:
            kept.append(entry)
    return kept


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one. A link that leads nowhere or to itself is no folder."""
    if not entry.is_symlink():
        return entry.is_dir()
    # entry.is_dir raises for a link to itself.
    return os.path.isdir(entry.path)  # noqa: PTH112


def refuse_flat(images: str | Path, num_pictures: int) -> NoReturn:
    """Raises InputError for a folder of pictures without class folders."""
    raise InputError(
        f"{images}: no class folders, and {num_pictures} images without a class; expected {images}/CLASS/IMAGE.jpg: "
        f"sort the images into folders, or list path and label in a .csv; {UNLABELLED_REMEDY}"
    )


def report_ignored(ignored: Sequence[str]) -> None:
    if ignored:
        log.info(f"ignored {len(ignored)} hidden and system entries, the first is {ignored[0]!r}")
