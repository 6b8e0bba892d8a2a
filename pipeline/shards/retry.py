"""Trying again, with growing waits, what a network or a disk failed to do; and the error when that did not help."""

import errno
import itertools
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import ExternalError

T = TypeVar("T")

# Waits do not shape results. The operating system's generator leaves the seeded ones as they were.
_jitter = random.SystemRandom()


class StoreError(ExternalError):
    """A file cannot be had from its store, or is not what its digest says. The message begins with the file's URL."""


class WrongBytes(Exception):
    """The store answered with other bytes than it was asked for."""


@dataclass(frozen=True)
class Retry:
    """`retry(url, call)` is `call()`, tried again when it fails, with doubled and jittered waits and a warning each."""

    attempts: int = 6
    first_wait_s: float = 0.5

    def __call__(self, url: str, call: Callable[[], T], on: type[Exception] = Exception) -> T:
        """Raises FileNotFoundError at once, and StoreError at once where permission is missing or the request itself is
        refused, or after the last attempt. Exceptions that are not `on` pass through."""
        for attempt in itertools.count(1):
            try:
                return call()
            except StoreError:
                raise
            # The causes are cut off: libraries put URLs into their messages, with the credentials in them.
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
            except on as error:
                cause = _describe(error)
                if _is_final(error):
                    raise StoreError(f"{url}: {cause}") from None
                if attempt >= self.attempts:
                    raise StoreError(f"{url}: {cause}; given up after {attempt} attempts") from None
            wait_s = self.first_wait_s * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.0)
            more = f"attempt {attempt + 1} of {self.attempts} in {wait_s:.1f} s"
            print(f"warning: {url}: {cause}; {more}", file=sys.stderr, flush=True)
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def redact(text: str) -> str:
    """`text` without the user names, passwords and query strings (signatures, tokens) of URLs in it."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"(https?://[^\s?]*)\?\S*|\?\S*=\S*", r"\1", text)


def _is_final(error: Exception) -> bool:
    # aiohttp's errors carry the status; other libraries raise Python's own classes for these.
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, PermissionError)


def _describe(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        text = f"HTTP {status} {getattr(error, 'message', '')}"
    elif isinstance(error, WrongBytes):
        text = str(error)
    elif isinstance(error, TimeoutError):
        text = f"timed out: {error}"
    else:
        text = f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()).rstrip(" :"))
