"""What all commands share: exit codes, one JSON line at the end of standard output, errors without tracebacks."""

import contextlib
import json
import math
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, TypeVar, cast

from pipeline.errors import DONE, FAILED, REQUEUE, USAGE, ExternalError, InputError
from pipeline.redact import Redacted, redact
from pipeline.shards.cache import CacheOptions

if TYPE_CHECKING:
    from pipeline.world import World  # whose torch takes seconds to import, for nothing in commands that need none

Value = TypeVar("Value")


class Subcommand(NamedTuple):
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], dict[str, Any]]


def choose(prog: str, description: str, subcommands: Mapping[str, Subcommand]) -> dict[str, Any]:
    """Run the sub-command that the command line names; returns its result."""
    parser = ArgumentParser(prog=prog, description=description)
    parsers = parser.add_subparsers(dest="subcommand", required=True)
    for name, entry in subcommands.items():
        entry.add_arguments(parsers.add_parser(name, help=entry.help, description=entry.help))
    arguments = parser.parse_args()
    return subcommands[arguments.subcommand].run(arguments)


def run(main: Callable[[], dict[str, Any] | None]) -> NoReturn:
    """Run a command and exit. `main` returns the result to print, or None on ranks that print nothing.

    A result whose "ok" is False exits with 1: the command worked and its answer is no. One whose "requeue" is True
    exits with 85: stopped early, start the same command again. Neither that nor standard error tells a secret.
    """
    with contextlib.redirect_stderr(cast(TextIO, Redacted(sys.stderr))):
        _run(main)


def _run(main: Callable[[], dict[str, Any] | None]) -> NoReturn:
    try:
        result = redact(main())
    except InputError as error:
        _fail(USAGE, f"error: {error}")
    except ExternalError as error:
        _fail(FAILED, f"error: {error}")
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except Exception as error:
        _fail(FAILED, _shortage(error) or traceback.format_exc())
    if result is not None:
        print(json.dumps(result, allow_nan=False), flush=True)
    if result and result.get("requeue"):
        sys.exit(REQUEUE)
    sys.exit(DONE if result is None or result.get("ok", True) else FAILED)


_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")
"""What Python's and the operating system's errors say where a limit is reached."""


def _shortage(error: Exception) -> str | None:
    """Returns the line for a machine that lacks memory or threads; None for every other error.

    Asked without an import of torch.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        why = str(error).partition("\n")[0].rstrip(".")
        return f"error: {why}: end what else is on the GPU, or run on the CPUs with CUDA_VISIBLE_DEVICES="
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_THREADS):
        why = str(error).strip().rpartition("\n")[2] or "out of memory"
        return f"error: {why}: raise the limits of this shell (ulimit -v, ulimit -u) or job, or start fewer workers"
    return None


def _fail(code: int, message: str) -> NoReturn:
    """End at once. An orderly exit would wait for collectives that this rank owes the others."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_early(read: Callable[[], Value]) -> Callable[["World"], Value]:
    """Read something on every rank before the ranks have met; returns the function that gives it once they have.

    A mistake is raised where there is one rank. Of several rank 0 reports it at once, and all end when they have met.
    """
    value, wrong = cast(Value, None), None
    try:
        value = read()
    except InputError as error:
        if (os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1") == "1":
            raise
        if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        wrong = error

    def on_all(world: "World") -> Value:
        if world.from_first(wrong is not None):
            os._exit(USAGE)
        if wrong:  # on this rank alone
            raise wrong
        return value

    return on_all


def add_cache(parser: ArgumentParser) -> None:
    """Adds the options of a command that reads data without a run's configuration."""
    parser.add_argument("--cache", metavar="DIR", help="folder for shards fetched from URLs, as data.cache of a run")
    parser.add_argument("--cache-gb", type=float, metavar="GB", help="its most disk space, as data.cache_gb")


def cache_of(arguments: Namespace) -> CacheOptions:
    """Returns what the options of `add_cache` say. Raises InputError."""
    if arguments.cache_gb is not None and not 0 < arguments.cache_gb < math.inf:
        raise InputError(f"--cache-gb {arguments.cache_gb:g}: a positive number was expected")
    return CacheOptions(arguments.cache, arguments.cache_gb)
