"""Reads JSON that may be damaged: each key once, no endless numbers, and errors of one line.

bytes ──read──▶ tree of dict, list, str, int, float, bool, None
"""

import json
from typing import Any

from pipeline.errors import InputError

_MAX_DIGITS = 100


def read(data: bytes, source: object) -> Any:
    """Returns the tree that a document stands for. Raises InputError of one line that names `source` and the place."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_mapping, parse_int=_whole_number)
    except RecursionError:
        why = "values are nested too deeply"
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
    except ValueError as error:
        why = str(error)
    raise InputError(f"{source}: not JSON: {why}")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise ValueError(f"{name[:100]!r} is set twice")
        tree[name] = value
    return tree


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; {_MAX_DIGITS} at most")
    return int(digits)
