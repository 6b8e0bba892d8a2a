"""The frame of all commands: exit codes, results for programs and for people, errors without tracebacks.

main() ──result──▶ a JSON line on standard output, where that is no terminal or with --json
   └──show(text)──▶ standard error; a result of which nothing was shown is listed there, on a terminal
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import traceback
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, TypeVar, cast

from pipeline import log
from pipeline.config import Config, dump_config, load_config
from pipeline.errors import DONE, FAILED, REQUEUE, USAGE, ExternalError, InputError
from pipeline.redact import RedactedStream, redact
from pipeline.shards.cache import CacheOptions

# Its torch takes seconds to import, and some commands do not need it.
if TYPE_CHECKING:
    from pipeline.world import World

Value = TypeVar("Value")


@dataclasses.dataclass
class _Output:
    """How this process reports its result."""

    wants_json: bool = False
    has_shown: bool = False


_output = _Output()


class Subcommand(NamedTuple):
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], dict[str, Any]]


def make_parser(prog: str, description: str, epilog: str | None = None) -> ArgumentParser:
    """Returns a parser of a command's arguments that has the options of all commands."""
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog)
    _add_common_options(parser)
    return parser


def _add_common_options(parser: ArgumentParser) -> None:
    log.add_options(parser)
    parser.add_argument("--json", action=_WantJson, help="print the result as JSON, also on a terminal")


class _WantJson(Action):
    """An option without a value."""

    def __init__(self, **others: Any) -> None:
        super().__init__(nargs=0, default=SUPPRESS, **others)

    def __call__(self, *_: object) -> None:
        _output.wants_json = True


def choose(prog: str, description: str, subcommands: Mapping[str, Subcommand]) -> dict[str, Any]:
    """Runs the sub-command that the command line names; returns its result."""
    parser = make_parser(prog, description)
    parsers = parser.add_subparsers(dest="subcommand", required=True)
    for name, entry in subcommands.items():
        subparser = parsers.add_parser(name, help=entry.help, description=entry.help)
        _add_common_options(subparser)
        entry.add_arguments(subparser)
    arguments = parser.parse_args()
    return subcommands[arguments.subcommand].run(arguments)


def run(main: Callable[[], dict[str, Any] | None]) -> NoReturn:
    """Runs a command and exits. `main` returns the result to print, or None on ranks that print nothing.

    A result whose "ok" is False exits with 1: the command worked and its answer is no. One whose "requeue" is True
    exits with 85: it was stopped early, and the same command has to be started again. Secrets are removed from the
    result and from standard error.
    """
    log.configure()
    with contextlib.redirect_stderr(cast(TextIO, RedactedStream(sys.stderr))):
        _run_and_exit(main)


def _run_and_exit(main: Callable[[], dict[str, Any] | None]) -> NoReturn:
    try:
        result = redact(main())
    except InputError as error:
        _fail(USAGE, f"error: {error}")
    except ExternalError as error:
        _fail(FAILED, f"error: {error}")
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except Exception as error:
        _fail(FAILED, _describe_shortage(error) or traceback.format_exc())
    if result is not None:
        _report(result)
    if result and result.get("requeue"):
        sys.exit(REQUEUE)
    is_ok = result is None or result.get("ok", True)
    sys.exit(DONE if is_ok else FAILED)


def _report(result: dict[str, Any]) -> None:
    if _output.wants_json or not sys.stdout.isatty():
        print(json.dumps(result, allow_nan=False), flush=True)
    elif not _output.has_shown:
        show(_list_contents(result))


def _list_contents(result: dict[str, Any]) -> str:
    """Returns a line for each entry of a result. Those that hold many values are counted."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict | list) and value:
            value = f"{len(value)} entries, which --json shows"
        elif value in (None, {}, []):
            value = "none"
        lines.append(f"{name.replace('_', ' ')}: {value}")
    return "\n".join(lines)


_THREAD_LIMIT_TEXTS = ("can't start new thread", "Resource temporarily unavailable")
"""The messages of Python and the operating system where a limit on threads or processes is reached."""


def _describe_shortage(error: Exception) -> str | None:
    """Returns a line with the remedy where the machine lacks memory or threads; None for every other error."""
    # Taken from the loaded modules: an import of torch would need even more memory.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        why = str(error).partition("\n")[0].rstrip(".")
        return f"error: {why}: end other processes on the GPU, or run on the CPUs with CUDA_VISIBLE_DEVICES="
    if isinstance(error, MemoryError) or any(text in str(error) for text in _THREAD_LIMIT_TEXTS):
        why = str(error).strip().rpartition("\n")[2] or "out of memory"
        return f"error: {why}: raise the limits of this shell (ulimit -v, ulimit -u) or job, or start fewer workers"
    return None


def _fail(code: int, message: str) -> NoReturn:
    """Exits at once."""
    # An orderly exit would wait for collectives in which the other ranks wait for this one.
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_early(read: Callable[[], Value]) -> Callable[["World"], Value]:
    """Reads something on every rank before the ranks are connected; returns the function that returns it afterwards.

    A single rank raises an error at once. Of several, rank 0 reports it at once, and all exit when they are connected:
    a rank that ended before would leave the others waiting.
    """
    value = cast(Value, None)
    error: InputError | None = None
    try:
        value = read()
    except InputError as raised:
        rank, world_size = log.rank_and_world_size()
        if world_size == "1":
            raise
        if rank == "0":
            print(f"error: {raised}", file=sys.stderr, flush=True)
        error = raised

    def finish(world: "World") -> Value:
        if world.from_first(error is not None):
            os._exit(USAGE)
        # Rank 0 has read it, so the error is this rank's alone.
        if error:
            raise error
        return value

    return finish


def show(text: str) -> None:
    """Prints what a command has found or done on standard error: for people, so not with --quiet."""
    _output.has_shown = True
    if not log.is_quiet():
        print(text, file=sys.stderr, flush=True)


def add_config(parser: ArgumentParser, *, required: bool = True, help: str = "configuration of the run") -> None:
    """Adds the options that `read_config` reads."""
    parser.add_argument("--config", required=required, metavar="FILE", help=help)
    add_overrides(parser)
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration, and end")


def add_overrides(parser: ArgumentParser) -> None:
    """Adds --set, whose values `load_config` applies to a configuration."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")


def read_config(arguments: Namespace) -> Config:
    """Reads a run's configuration. With --print-config the first rank prints it as YAML, and the command ends."""
    config = load_config(arguments.config, arguments.set)
    if arguments.print_config:
        rank, _ = log.rank_and_world_size()
        if rank == "0":
            print(redact(dump_config(config)), end="", flush=True)
        sys.exit(DONE)
    return config


def add_cache(parser: ArgumentParser) -> None:
    """Adds the options of a command that reads data without a run's configuration."""
    parser.add_argument("--cache", metavar="DIR", help="folder for shards fetched from URLs, as data.cache of a run")
    parser.add_argument(
        "--cache-gb", type=float, metavar="GB", help="maximum size of that folder, as data.cache_gb of a run"
    )


def cache_of(arguments: Namespace) -> CacheOptions:
    """Returns the values of the options of `add_cache`. Raises InputError for an invalid one."""
    if arguments.cache_gb is not None and not 0 < arguments.cache_gb < math.inf:
        raise InputError(f"--cache-gb {arguments.cache_gb:g}: a positive number was expected")
    return CacheOptions(arguments.cache, arguments.cache_gb)
