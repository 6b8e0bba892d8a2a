"""Repairs an embedded database that was moved or copied: MLflow stores absolute paths, which then lead to the old one.

OLD/mlflow.db  OLD/artifacts/  ──mv, cp──▶  NEW/mlflow.db  NEW/artifacts/
                                                │ its paths still begin with file://OLD/artifacts/
                                                ├─former_folders──▶ {file://OLD}, and nothing is read or written
                                                └─relocate────────▶ they begin with file://NEW/artifacts/
"""

import contextlib
import os
import shlex
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InputError

_ARTIFACTS = "/artifacts/"
_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's schema that hold paths of artifacts."""


def former_folders(database: Path) -> set[str]:
    """Returns the URIs of the folders that the artifacts of a moved or copied database were once stored in.

    Empty for a database that was never moved. Raises InputError for a file that is no database of MLflow's.
    """
    query = "SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file://%'"
    former = set()
    with _open_database(database) as connection:
        for (location,) in connection.execute(query):
            folder, separator, name = location.rpartition(_ARTIFACTS)
            if separator and _was_left(folder, name, database.resolve()):
                former.add(folder)
    return former


def relocate(database: Path) -> int:
    """Makes the paths in a moved or copied database lead to the artifacts beside it; returns how many were changed.

    Raises InputError, and changes nothing, where artifacts were left behind in the old folder.
    """
    new = database.resolve().parent.as_uri()
    former = sorted(former_folders(database))
    num_changed = 0
    # All in one transaction: an error in any table leaves every path as it was.
    with _open_database(database) as connection:
        for old in former:
            for table, column in _PATHS:
                below_old = f"instr({column}, ?) = 1"
                paths = connection.execute(f"SELECT {column} FROM {table} WHERE {below_old}", [f"{old}/"])
                _require_all_moved(old, new, [path.removeprefix(old) for (path,) in paths])
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {below_old}"
                num_changed += connection.execute(change, [new, len(old) + 1, f"{old}/"]).rowcount
    return num_changed


def _was_left(folder: str, name: str, database: Path) -> bool:
    """Whether an experiment's artifacts were in the database's own folder, which is now another one.

    They may also have been put elsewhere on purpose. Then there are none beside the database, and no other database
    lies beside them.
    """
    former = _path_of(folder)
    here = database.parent
    if not _exists(former):
        return True
    if former.samefile(here):
        return False
    if _exists(former / database.name):
        return True
    return (here / "artifacts" / _path_of(name)).exists()


def _require_all_moved(old: str, new: str, names: list[str]) -> None:
    for name in names:
        target = _path_of(new + name)
        if _exists(_path_of(old + name)) and not target.exists():
            from_folder = shlex.quote(f"{_path_of(old)}{_ARTIFACTS}")
            to_folder = shlex.quote(f"{_path_of(new)}{_ARTIFACTS}")
            raise InputError(
                f"{target}: was left in {_path_of(old)}: not all artifacts were moved with the database; bring "
                f"the others: rsync -a --ignore-existing {from_folder} {to_folder}"
            )


@contextlib.contextmanager
def _open_database(database: Path) -> Iterator[sqlite3.Connection]:
    """Yields a connection whose changes are committed at the end of the block, or none of them after an error."""
    try:
        # A connection's own context commits or rolls back, but does not close.
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot be used as a database of MLflow's: {error}") from error


def _exists(path: Path) -> bool:
    """Whether a path exists and this user can see it."""
    # Path.exists raises PermissionError inside of a colleague's closed folder.
    return os.access(path, os.F_OK)


def _path_of(uri: str) -> Path:
    return Path(urllib.parse.unquote(uri.removeprefix("file://")))
