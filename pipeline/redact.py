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
    """A copy of a tree of mappings, lists and values without what must not be shown: values whose key says secret
    (password, token, api_key, …); in text what follows such a name as KEY=VALUE, as a header (Authorization: Bearer …)
    or as an option (--password …), up to the end of the line; and in URLs the user and the query, which is a signature
    in those that give access by themselves. It takes linear time."""
    if isinstance(value, dict):
        return {key: MASK if _is_secret(str(key), item) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        named = [isinstance(item, str) and item.startswith("-") and _says_secret(item) for item in value]
        return [MASK if after else redact(item) for after, item in zip([False, *named], value, strict=False)]
    if isinstance(value, str):
        return "\n".join(map(_redacted_line, redact_urls(value).split("\n")))
    return value


def redact_urls(text: str) -> str:
    """`text` without the users and queries of the URLs in it."""

    def one(match: re.Match[str]) -> str:
        user, place, query = split_url(match[2])
        return "".join([match[1], user and f"{MASK}@", place, f"?{MASK}" if len(query) > 1 else query])

    return _URL.sub(one, text)


def split_url(url: str) -> tuple[str, str, str]:
    """The user with the password, the place, and the query from its question mark on, of what follows :// in a URL.

    Passwords may hold any character, as people write them: where a colon comes before the first slash, the last @ ends
    them. So a path after HOST:PORT should have no @; and where that @ comes after a question mark, what belongs to whom
    cannot be told, and all of it is taken for the user.
    """
    head, _, tail = url.rpartition("@")
    if head and ":" not in head.partition("/")[0] and re.search("[/?#]", head):  # an @ of the path or the query
        head, tail = "", url
    if "?" in head:
        return url, "", ""
    place, mark, query = tail.partition("?")
    return head, place, mark + query


def printable(text: object) -> str:
    """`text` as one line that does nothing to a terminal: control characters, ends of lines and what turns the
    direction of writing are escaped as in Python."""
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
