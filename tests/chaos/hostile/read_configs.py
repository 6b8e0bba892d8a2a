"""Reads every configuration of a folder and lists those that end otherwise than read or refused in time."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from pipeline import cli
from pipeline.config import load_config
from pipeline.errors import InputError

LIMIT_S = 20


def main() -> dict[str, Any]:
    os.chdir(sys.argv[1])
    signal.signal(signal.SIGALRM, _too_long)
    crashed, read, refused = [], 0, 0
    for path in sorted(Path().glob("*.yaml")):
        signal.alarm(LIMIT_S)
        try:
            load_config(path)
            read += 1
        except InputError as error:
            refused += 1
            if "pydantic" in str(error):
                crashed.append(f"{path}: {error}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            crashed.append(f"{path}: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
        finally:
            signal.alarm(0)
    return {"crashed": crashed, "read": read, "refused": refused}


def _too_long(*_: object) -> NoReturn:
    raise TimeoutError(f"not read after {LIMIT_S} s")


if __name__ == "__main__":
    cli.run(main)
