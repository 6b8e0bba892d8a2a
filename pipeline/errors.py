"""Defines the errors that users see, and the exit codes of commands."""

import contextlib
from collections.abc import Iterator

# The exit codes of commands.
DONE = 0
FAILED = 1
USAGE = 2
REQUEUE = 85
"""The exit code of a run that was stopped by a signal, has saved, and is to be started again."""
STOPPING = "stopping after this step"
"""The line with which a rank answers a signal. A batch job waits for it."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a setting, a command line.

    The message names the file or key, the value found, the rule and the remedy. Commands print it alone, without a
    traceback, and end with exit code 2.
    """


class ExternalError(RuntimeError):
    """Something that a run depends on has failed: a store, or too many samples. The program and its input are correct.

    The message says what failed and the remedy. Commands print it alone and end with exit code 1.
    """


@contextlib.contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Wraps imports of packages that an extra in pyproject.toml installs.

    Where a package is missing, raises InputError that names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what}: needs the package {error.name}, which is not installed: pip install -e '.[{extra}]' in this "
            "project's folder"
        ) from error
