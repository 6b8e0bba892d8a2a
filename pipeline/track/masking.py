"""What must not leave a run's folder is masked on its way out: to a server, or onto a page."""

import re
from typing import Any

_MASK = "***"
_SECRET_NAME = re.compile(
    r"(^|_)(passwords?|passwd|passphrase|secrets?|token|credentials?|api_?key|access_?key|private_?key)(_|$)"
)
# Possessive (++) and only from the start of a word: otherwise long words take quadratic time.
_URL = re.compile(r"(?<![\w+.-])([\w+.-]++://)([^\s\"'<>]*)")
_ASSIGNMENT = re.compile(r"(?<![\w.-])([\w.-]++)[\"']?\s*+[=:]\s*+(?=\S)")


def mask_secrets(value: Any) -> Any:
    """A copy of a tree of mappings, lists and values without what must not be logged: values whose key says secret
    (password, token, api_key, …), also where a string assigns one (KEY=VALUE), and in URLs the user and the query,
    which is a signature in those that give access by themselves."""
    if isinstance(value, dict):
        return {
            key: _MASK if _says_secret(str(key)) and item is not None else mask_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_secrets(item) for item in value]
    if isinstance(value, str):
        text = mask_urls(value)
        for match in _ASSIGNMENT.finditer(text):
            if _says_secret(match[1]):
                return text[: match.end()] + _MASK
        return text
    return value


def _says_secret(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(_SECRET_NAME.search(re.sub(r"[^a-z0-9]+", "_", snake.lower())))


def mask_urls(text: str) -> str:
    """`text` without the users and queries of the URLs in it."""

    def one(match: re.Match[str]) -> str:
        host, slash, path = re.sub(r"^[^/]*@", f"{_MASK}@", match[2]).partition("/")
        return match[1] + re.sub(r"\?.+", f"?{_MASK}", host + slash + path)

    return _URL.sub(one, text)
