"""What all commands share: exit codes, one JSON line at the end of standard output, errors without tracebacks."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline.errors import InputError
from pipeline.world import World

DONE, FAILED, USAGE = 0, 1, 2

Value = TypeVar("Value")


def run(main: Callable[[], dict[str, Any] | None]) -> NoReturn:
    """Run a command and exit. `main` returns the result to print, or None on ranks that print nothing.

    A result whose "ok" is False exits with 1: the command worked and its answer is no.
    """
    try:
        result = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(FAILED)
    if result is not None:
        print(json.dumps(result), flush=True)
    sys.exit(DONE if result is None or result.get("ok", True) else FAILED)


def first_then_all(world: World, build: Callable[[], Value]) -> Value:
    """Build something on every rank, but on rank 0 first, so that a mistake all ranks would make is told once.

    Collective. On the other ranks a mistake of rank 0 ends the process quietly.
    """
    error, value = None, None
    if world.is_first:
        try:
            value = build()
        except InputError as raised:
            error = raised
    if world.from_first(error is not None):
        raise error if error else SystemExit(USAGE)
    return build() if value is None else value


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Put result.json into a run's folder, whole or not at all."""
    partial = folder / ".result.json.partial"
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(folder / "result.json")
