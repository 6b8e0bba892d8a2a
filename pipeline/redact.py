"""What must not leave a process as it is: secrets are masked, and control characters are escaped.

settings, results, run.json ──redact──▶ files that others may read, tracking server, pages
anything on standard error ──Redacted──▶ the same, and no control sequence of somebody's file name
a name from elsewhere ──printable──▶ one line of a message or table
"""

import re
from typing import Any, TextIO

MASK = "***"
# Tokens of these kinds are parameters of networks.
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

    Masked are values whose key says secret (password, token, api_key, …); in text, up to the end of the line, what
    follows such a name as KEY=VALUE, as a header (Authorization: Bearer …) or as an option (--password …); and in URLs
    the user and the query, which is a signature in URLs that give access by themselves.
    """
    if isinstance(value, dict):
        return {key: MASK if _is_secret(str(key), item) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        named = [isinstance(item, str) and item.startswith("-") and _says_secret(item) for item in value]
        return [MASK if after else redact(item) for after, item in zip([False, *named], value, strict=False)]
    if isinstance(value, str):
        return "\n".join(map(_redacted_line, redact_urls(value).split("\n")))
    return value


def redact_urls(text: str) -> str:
    """Returns `text` with the users and queries of its URLs masked."""

    def one(match: re.Match[str]) -> str:
        user, place, query = split_url(match[2])
        return "".join([match[1], user and f"{MASK}@", place, f"?{MASK}" if len(query) > 1 else query])

    return _URL.sub(one, text)


def split_url(url: str) -> tuple[str, str, str]:
    """Splits what follows :// in a URL into user (with password), place, and query (with its question mark).

    A password may hold any character, as people write it: where a colon comes before the first slash, the last @ ends
    it. A path behind HOST:PORT should therefore have no @. Where that @ comes behind a question mark the parts cannot
    be told apart, and all of it is taken for the user.
    """
    head, _, tail = url.rpartition("@")
    if head and ":" not in head.partition("/")[0] and re.search("[/?#]", head):  # an @ of the path or the query
        head, tail = "", url
    if "?" in head:
        return url, "", ""
    place, mark, query = tail.partition("?")
    return head, place, mark + query


def printable(text: object) -> str:
    """Returns `text` as one line that does nothing to a terminal.

    Control characters, ends of lines, and characters that turn the direction of writing are escaped as in Python.
    """
    return _CONTROL.sub(_escaped, str(text))


class Redacted:
    """A text stream that writes everything redacted, and control characters escaped but for tabs and ends of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(_SEQUENCE.sub(_escaped, redact(text)))
        return len(text)


def _redacted_line(line: str) -> str:
    line = _QUERY.sub(f"?{MASK}", line)
    for match in _NAMED.finditer(line):
        name, sign = match.groups()
        # A colon after a setting's name, engine.token: no such setting, begins a message. After a space comes the value
        # of an option or, as in Bearer …, of a header.
        is_option = name.startswith("-") or name.lower() == "bearer"
        if (sign == "=" or (sign == ":" and "." not in name) or (not sign and is_option)) and _says_secret(name):
            return line[: match.end()] + MASK
    return line


def _is_secret(key: str, item: Any) -> bool:
    return not isinstance(item, float | None) and _says_secret(key)


def _says_secret(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(_SECRET_NAME.search(re.sub(r"[^a-z0-9]+", "_", snake.lower())))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()
