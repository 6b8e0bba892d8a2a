"""An embedded database that was moved or copied: MLflow stores absolute paths, which then lead to the old place.

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
    """Returns the URIs of the folders in which the artifacts of a moved or copied database were once put; none for a
    database that is where it was made. Raises InputError for a file that is no database of MLflow's."""
    with _opened(database) as connection:
        rows = connection.execute("SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file://%'")
        parts = [location.rpartition(_ARTIFACTS) for (location,) in rows]
    return {folder for folder, found, name in parts if found and _was_left(folder, name, database.resolve())}


def relocate(database: Path) -> int:
    """Have the paths in a moved or copied database lead to the artifacts beside it; returns how many were changed.

    Raises InputError, and changes nothing, where artifacts were left behind in the old place.
    """
    new, num_changed = database.resolve().parent.as_uri(), 0
    moves = [(old, table, column) for old in sorted(former_folders(database)) for table, column in _PATHS]
    with _opened(database) as connection:
        for old, table, column in moves:
            below_old = f"instr({column}, ?) = 1"
            paths = connection.execute(f"SELECT {column} FROM {table} WHERE {below_old}", [f"{old}/"])
            _require_all(old, new, [path.removeprefix(old) for (path,) in paths])
            changed = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {below_old}"
            num_changed += connection.execute(changed, [new, len(old) + 1, f"{old}/"]).rowcount
    return num_changed


def _was_left(folder: str, name: str, database: Path) -> bool:
    """Whether an experiment's artifacts were in a folder of runs that is no longer the database's. They may also have
    been put elsewhere on purpose: then there are none here, and there is no other database."""
    former, here = _path(folder), database.parent
    if not _exists(former):
        return True
    if former.samefile(here):
        return False
    return _exists(former / database.name) or (here / "artifacts" / _path(name)).exists()


def _require_all(old: str, new: str, names: list[str]) -> None:
    for name in names:
        if _exists(_path(old + name)) and not _path(new + name).exists():
            source, target = (shlex.quote(f"{_path(folder)}{_ARTIFACTS}") for folder in (old, new))
            raise InputError(
                f"{_path(new + name)}: was left in {_path(old)}: not all artifacts were moved with the database; bring "
                f"the others: rsync -a --ignore-existing {source} {target}"
            )


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose changes all count at the end of the block, or none."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot be used as a database of MLflow's: {error}") from error


def _exists(path: Path) -> bool:
    """False also for what this user may not see, such as the folder of a colleague."""
    return os.access(path, os.F_OK)


def _path(uri: str) -> Path:
    return Path(urllib.parse.unquote(uri.removeprefix("file://")))
