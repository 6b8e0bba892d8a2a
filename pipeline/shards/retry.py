"""Trying again, with growing waits, what a network or a disk failed to do; and the error when that did not help."""

import errno
import itertools
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ExternalError
from pipeline.files import UnreadableError
from pipeline.redact import redact

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
    last_start_s: float = 180.0
    """No attempt begins later than this after the first one did."""

    def __call__(self, url: str, call: Callable[[], T], on: type[Exception] = Exception) -> T:
        """Raises FileNotFoundError at once, and StoreError at once where permission is missing or the request itself is
        refused, or after the last attempt. Exceptions that are not `on` pass through."""
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return call()
            except StoreError:
                raise
            # The causes are cut off: libraries put URLs into their messages, with the credentials in them.
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, _what_is_missing(error), url) from None
            except on as error:
                cause = _describe(error)
                if _is_final(error):
                    raise StoreError(f"{url}: {cause}{_remedy(error)}") from None
                if attempt >= self.attempts or time.monotonic() - started > self.last_start_s:
                    raise StoreError(f"{url}: {cause}; given up after {attempt} attempt{'s' * (attempt > 1)}") from None
            wait_s = self.first_wait_s * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.0)
            more = f"attempt {attempt + 1} of {self.attempts} in {wait_s:.1f} s"
            print(f"warning: {url}: {cause}; {more}", file=sys.stderr, flush=True)
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    status = _status(error)
    is_refused = status is not None and 400 <= status < 500 and status not in (408, 425, 429)
    is_slow = isinstance(error, TimeoutError)  # which S3 answers with 400
    return _is_denied(error) or _is_wrong_kind(error) or (is_refused and not is_slow)


def _is_wrong_kind(error: Exception) -> bool:
    is_wrong_path = isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
    return is_wrong_path or isinstance(error, UnreadableError)


def _is_denied(error: Exception) -> bool:
    # By name, because botocore takes a second to import.
    lacks_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    return lacks_credentials or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _answer(error: Exception) -> dict[str, Any]:
    """What botocore has kept of the server's answer, where s3fs has raised one of Python's own errors for it."""
    return getattr(error.__cause__, "response", None) or {}


def _status(error: Exception) -> int | None:
    """The status of an HTTP answer."""
    status = getattr(error, "status", None) or _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _what_is_missing(error: FileNotFoundError) -> str:
    if _answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
        return "no such bucket: check its name, and AWS_ENDPOINT_URL if it is not on AWS"
    return os.strerror(errno.ENOENT)


def _remedy(error: Exception) -> str:
    """What to do about a request that was refused."""
    if _is_wrong_kind(error):
        return ""
    if _is_denied(error):
        return (
            "; access is denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3, .netrc for https; "
            "a token or signed URL may have expired: renew it; some stores answer so where there is no such file"
        )
    if _status(error) == 400:
        return "; check AWS_DEFAULT_REGION and AWS_ENDPOINT_URL, and whether a token or signed URL has expired"
    return "; check the address"


def _describe(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        text = f"HTTP {status} {getattr(error, 'message', None) or getattr(error, 'strerror', None) or error}"
    elif isinstance(error, WrongBytes):
        text = str(error)
    elif isinstance(error, OSError) and _is_wrong_kind(error):
        text = str(error.strerror)
    elif isinstance(error, TimeoutError):
        text = f"timed out: {error}"
    else:
        text = f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()).rstrip(" :"))
