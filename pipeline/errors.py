"""The errors that users meet, and how commands end."""

import contextlib
from collections.abc import Iterator

DONE, FAILED, USAGE, REQUEUE = 0, 1, 2, 85
"""Exit codes. The last one: stopped by a signal, saved, to be started again."""
STOPPING = "stopping after this step"
"""A rank answers a signal with these words, and a batch job waits for them."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a setting, a command line.

    The message names the file or key, the value found, the rule and the way out. Commands print it alone,
    without a traceback, and end with exit code 2.
    """


class ExternalError(RuntimeError):
    """What a run depends on has failed: a store, too many samples. Nothing in the program or its input is wrong.

    The message says what failed and the way out. Commands print it alone and end with exit code 1.
    """


@contextlib.contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Wraps imports of packages that an extra in pyproject.toml installs.

    Raises InputError, which names the package and the extra, where one is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what}: needs the package {error.name}, which is not installed: pip install -e '.[{extra}]' in this "
            "project's folder"
        ) from error
