"""Retries what a network or a disk failed to do, with growing waits, and raises StoreError when that did not help.

call ──fails──▶ wait ──▶ call ──fails──▶ … ──▶ StoreError with the cause and a remedy
"""

import errno
import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ExternalError
from pipeline.files import UnreadableError
from pipeline.redact import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

# Waits do not influence results, so they must not draw from a seeded generator.
_jitter = random.SystemRandom()


class StoreError(ExternalError):
    """A file cannot be read from its store, or does not match its digest. The message begins with the file's URL."""


class WrongBytes(Exception):
    """The store answered with other bytes than it was asked for."""


@dataclass(frozen=True)
class Retry:
    """`retry(url, call)` returns `call()`, and retries it when it fails.

    Waits are doubled and jittered, and each failure is reported.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    last_start_s: float = 180.0
    """The time after the first attempt from which no further one begins."""

    def __call__(self, url: str, call: Callable[[], T], on: type[Exception] = Exception) -> T:
        """Calls `call` until it succeeds, and returns its result.

        Raises FileNotFoundError at once. Raises StoreError after the last attempt, and at once where access is denied
        or the request itself is refused. Exceptions of other types than `on` are not caught.
        """
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return call()
            # A call that itself retries has done so.
            except StoreError:
                raise
            # The causes are cut off: libraries put URLs into their messages, with the credentials in them.
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, _describe_missing(error), url) from None
            except on as error:
                cause = _describe(error)
                if _is_final(error):
                    raise StoreError(f"{url}: {cause}{_remedy(error)}") from None
                if attempt >= self.attempts or time.monotonic() - started > self.last_start_s:
                    unit = "attempt" if attempt == 1 else "attempts"
                    raise StoreError(f"{url}: {cause}; given up after {attempt} {unit}") from None
            wait_s = self.first_wait_s * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.0)
            more = f"attempt {attempt + 1} of {self.attempts} in {wait_s:.1f} s"
            log.warning(f"{url}: {cause}; {more}")
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    status = _status(error)
    if _is_denied(error) or _is_wrong_kind(error):
        return True
    # S3 answers a time-out with 400.
    if status is None or isinstance(error, TimeoutError):
        return False
    # These three ask the client to try again.
    return 400 <= status < 500 and status not in (408, 425, 429)


def _is_wrong_kind(error: Exception) -> bool:
    if isinstance(error, UnreadableError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


def _is_denied(error: Exception) -> bool:
    # By name, because botocore takes a second to import.
    lacks_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    return lacks_credentials or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _answer(error: Exception) -> dict[str, Any]:
    """Returns what botocore keeps of the server's answer; s3fs raises one of Python's own errors in its place."""
    return getattr(error.__cause__, "response", None) or {}


def _status(error: Exception) -> int | None:
    """Returns the status of an HTTP answer; None for other errors."""
    metadata = _answer(error).get("ResponseMetadata", {})
    status = getattr(error, "status", None) or metadata.get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _describe_missing(error: FileNotFoundError) -> str:
    if _answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
        return "no such bucket: check its name, and AWS_ENDPOINT_URL if it is not on AWS"
    return os.strerror(errno.ENOENT)


def _remedy(error: Exception) -> str:
    """Returns what the user can do about a request that was refused."""
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
        message = getattr(error, "message", None) or getattr(error, "strerror", None)
        text = f"HTTP {status} {message or error}"
    elif isinstance(error, WrongBytes):
        text = str(error)
    elif isinstance(error, OSError) and _is_wrong_kind(error):
        text = str(error.strerror)
    elif isinstance(error, TimeoutError):
        text = f"timed out: {error}"
    else:
        text = f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()).rstrip(" :"))
