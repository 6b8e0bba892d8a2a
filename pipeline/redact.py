"""Masks secrets and escapes control characters in what leaves a process.

settings, results, run.json ──redact──▶ files that others may read, tracking server, pages
anything on standard error ──Redacted──▶ the same, and no control sequence of somebody's file name
a name from elsewhere ──printable──▶ one line of a message or table
"""

import re
from typing import Any, TextIO

MASK = "***"
# The tokens with the prefixes in (?<!…) are parameters of networks.
_SECRET_NAME = re.compile(
    r"(^|_)(passwords?|passwd|pwd|passphrase|secrets?|(?<!cls_)(?<!dist_)(?<!mask_)(?<!reg_)token|credentials?"
    r"|authorization|bearer|cookie|sig|signature|(api|access|account|private)_?key)(_|$)"
)
# Possessive (++) and only from the start of a word: otherwise long words take quadratic time.
_URL = re.compile(r"(?<![\w+.-])([\w+.-]++://)([^\s\"'<>]*)")
_QUERY = re.compile(r"\?[^\s?=\"'<>]++=[^\s\"'<>]*")
_NAMED = re.compile(r"(?<![\w.-])([\w.-]++)(?:[\"']?\s*+([=:])\s*+|\s++)(?=[^\s-])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SEQUENCE = re.compile(rf"(?![\t\r\n]){_CONTROL.pattern}")


def redact(value: Any) -> Any:
    """Returns a copy of a tree of mappings, lists and values in which secrets are masked, in linear time.

    Values whose key names a secret (password, token, api_key, …) are masked. In text, what follows such a name is
    masked up to the end of the line: as KEY=VALUE, as a header (Authorization: Bearer …) or as an option
    (--password …). In URLs the user and the query are masked, because a query may be a signature that gives access.
    """
    if isinstance(value, dict):
        masked = {}
        for key, item in value.items():
            masked[key] = MASK if _is_secret(str(key), item) else redact(item)
        return masked
    if isinstance(value, list | tuple):
        return _redact_arguments(value)
    if isinstance(value, str):
        lines = redact_urls(value).split("\n")
        return "\n".join(map(_redact_line, lines))
    return value


def _redact_arguments(items: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Returns the items redacted. A list may be a command line, in which a secret follows its option."""
    masked = []
    follows_option = False
    for item in items:
        masked.append(MASK if follows_option else redact(item))
        follows_option = isinstance(item, str) and item.startswith("-") and _names_secret(item)
    return masked


def redact_urls(text: str) -> str:
    """Returns `text` with the users and queries of its URLs masked."""
    return _URL.sub(_redact_url, text)


def _redact_url(match: re.Match[str]) -> str:
    user, address, query = split_url(match[2])
    if user:
        user = f"{MASK}@"
    if len(query) > 1:
        query = f"?{MASK}"
    return f"{match[1]}{user}{address}{query}"


def split_url(url: str) -> tuple[str, str, str]:
    """Splits what follows :// in a URL into user (with password), address, and query (with its question mark).

    People write passwords with any character in them: where a colon comes before the first slash, the last @ ends the
    password. A path behind HOST:PORT should therefore have no @. Where that @ comes behind a question mark, the
    components cannot be distinguished, and the whole text is taken for the user.
    """
    user, _, rest = url.rpartition("@")
    host, _, _ = user.partition("/")
    # Without a password, an @ behind a slash or question mark belongs to the path or the query.
    if user and ":" not in host and re.search("[/?#]", user):
        user = ""
        rest = url
    if "?" in user:
        return url, "", ""
    address, mark, query = rest.partition("?")
    return user, address, mark + query


def printable(text: object) -> str:
    """Returns `text` as one line without effects on a terminal.

    Control characters, ends of lines, and characters that change the writing direction are escaped as in Python.
    """
    return _CONTROL.sub(_escape, str(text))


class RedactedStream:
    """A text stream that redacts what is written, and escapes control characters except tabs and ends of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(_SEQUENCE.sub(_escape, redact(text)))
        return len(text)


def _redact_line(line: str) -> str:
    line = _QUERY.sub(f"?{MASK}", line)
    for match in _NAMED.finditer(line):
        name, sign = match.groups()
        if sign == "=":
            has_value = True
        elif sign == ":":
            # A colon after a setting's name, engine.token: no such setting, begins a message.
            has_value = "." not in name
        else:
            # After a space comes the value of an option or, as in Bearer …, of a header.
            has_value = name.startswith("-") or name.lower() == "bearer"
        if has_value and _names_secret(name):
            return line[: match.end()] + MASK
    return line


def _is_secret(key: str, item: Any) -> bool:
    # A float is a metric or a hyperparameter, and None means that nothing is set.
    return not isinstance(item, float | None) and _names_secret(key)


def _names_secret(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = re.sub(r"[^a-z0-9]+", "_", snake.lower())
    return _SECRET_NAME.search(words) is not None


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()
