"""Reads JSON that may be damaged: keys must be unique, numbers have a limited length, and errors take one line.

bytes ──read──▶ tree of dict, list, str, int, float, bool, None
"""

import json
from typing import Any

from pipeline.errors import InputError

# Python's conversion of decimal digits takes quadratic time.
_MAX_DIGITS = 100


def read(data: bytes, source: object) -> Any:
    """Returns the document's tree. Raises InputError with one line that names `source` and the position."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_build_mapping,
            parse_int=_parse_int,
        )
    except RecursionError:
        reason = "values are nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except ValueError as error:
        reason = str(error)
    raise InputError(f"{source}: not JSON: {reason}")


def _build_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise ValueError(f"{name[:100]!r} is set twice")
        tree[name] = value
    return tree


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; {_MAX_DIGITS} at most")
    return int(digits)
