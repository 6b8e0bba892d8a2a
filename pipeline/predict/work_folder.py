"""Keeps what is finished of a prediction, so that one that was killed goes on where it was.

    OUT.partial/  job.json          what is predicted; the work of another command is dropped
                  rows-R.jsonl      a line for each image that rank R has finished
                  features.npy      a row for each image, in the order of the images

The outputs are made of it at the end, each whole or not at all.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import files
from pipeline.errors import ExternalError, InputError

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""What is said about an image: its position, its path, and either an answer's columns or "error"."""


class WorkFolder:
    """The folder beside an output file. `job` says what is predicted, in JSON's terms."""

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self._job = json.dumps(job)
        self._features = self.path / "features.npy"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other commands out. Raises InputError where one works in the folder, and where it cannot be written."""
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(exist_ok=True)
                stack.enter_context(files.locked(self.path / "lock", wait=False))
            except BlockingIOError as error:
                raise InputError(
                    f"{self.path}: another command is at work in it: wait, or name another file"
                ) from error
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written: {error.strerror}: name another file") from error
            yield

    def prepare(self) -> dict[int, tuple[Path, int]]:
        """Drops the work of another command and lines that were cut short; returns what `find_rows` does."""
        note = self.path / "job.json"
        if note.exists() and note.read_text() != self._job:
            log.warning(f"{self.path}: is of another model, other images or options, so it is made anew")
            for path in (note, self._features, *self._row_files()):
                path.unlink(missing_ok=True)
        for path in self._row_files():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        if not note.exists():
            files.write(note, self._job.encode())
        return self.find_rows()

    def find_rows(self) -> dict[int, tuple[Path, int]]:
        """Returns the file of each finished image's row and where it begins there, by the image's position."""
        found = {}
        for path in self._row_files():
            with path.open("rb") as file:
                start = 0
                for line in file:
                    found[json.loads(line)["position"]] = path, start
                    start += len(line)
        return found

    def read_rows(self, rows: dict[int, tuple[Path, int]]) -> Iterator[Row]:
        """Yields the rows in the order of the images."""
        with contextlib.ExitStack() as stack:
            opened = {path: stack.enter_context(path.open("rb")) for path in self._row_files()}
            for _, (path, start) in sorted(rows.items()):
                opened[path].seek(start)
                yield json.loads(opened[path].readline())

    def append(self, rank: int, rows: Iterable[Row]) -> None:
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        try:
            with (self.path / f"rows-{rank}.jsonl").open("a") as file:
                file.write("".join(lines))
        except OSError as error:
            raise ExternalError(f"{self.path}: {error.strerror}: make room and start the command again") from error

    def make_features(self, shape: tuple[int, ...]) -> None:
        """Makes the features of all images, `shape` [n, …] float32, unless they are there."""
        if not self._features.exists():
            partial = self._features.with_suffix(".new")
            np.lib.format.open_memmap(partial, "w+", np.float32, shape).flush()
            partial.rename(self._features)

    def write_features(self, first: int, values: np.ndarray) -> None:
        """Writes the features of consecutive images, the first of which has the position `first`."""
        features = self.open_features("r")
        # Not through mapped memory: ranks on several nodes would overwrite each other's rows in shared pages.
        with self._features.open("rb+") as file:
            file.seek(features.offset + first * features[0].nbytes)
            file.write(values.astype(np.float32).tobytes())

    def open_features(self, mode: Literal["r", "r+"]) -> np.memmap:
        return np.lib.format.open_memmap(self._features, mode)

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _row_files(self) -> list[Path]:
        return sorted(self.path.glob("rows-*.jsonl"))
