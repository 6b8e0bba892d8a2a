"""HTTP and S3 servers that answer what no client hopes for."""

import contextlib
import gzip
import re
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.hostile.data import FEED, INDEX, VERIFY
from tests.chaos.hostile.mutate import Rng, pick
from tests.chaos.hostile.trial import Case, Sandbox

Answer = Callable[[bytes], Iterator[bytes]]
"""Yields an answer's bytes, headers included, in place of a file's content."""

IMPATIENT = "tests.chaos.hostile.impatient"
_BLOCK = bytes(1 << 16)


def _answer(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode("latin-1")


def _endless(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK")
    while True:
        yield _BLOCK


def _longer(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK", f"Content-Length: {10**15}")
    yield data
    while True:
        yield _BLOCK


def _endless_chunks(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK", "Transfer-Encoding: chunked")
    while True:
        yield b"10000\r\n" + _BLOCK + b"\r\n"


def _bad_chunks(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK", "Transfer-Encoding: chunked")
    yield b"-5\r\nxxxx\r\nzz\r\n" + b"f" * 100_000


def _gzip_bomb(data: bytes) -> Iterator[bytes]:
    packed = gzip.compress(bytes(1 << 28), 9) * 16  # four gigabytes, as many members
    yield _answer("200 OK", "Content-Encoding: gzip", f"Content-Length: {len(packed)}")
    yield packed


def _encoded(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK", "Content-Encoding: br", f"Content-Length: {len(data)}")
    yield data


def _trickle(data: bytes) -> Iterator[bytes]:
    yield _answer("200 OK", f"Content-Length: {10**6}")
    while True:
        time.sleep(0.5)
        yield b"x"


def _slow_headers(data: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        time.sleep(0.5)
        yield b"X-A: b\r\n"


def _endless_headers(data: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        yield b"X-A: b\r\n" * 1000


def _long_header(data: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nX-A: "
    while True:
        yield b"a" * (1 << 16)


def _endless_continue(data: bytes) -> Iterator[bytes]:
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n"


def _silent(data: bytes) -> Iterator[bytes]:
    time.sleep(1)
    yield b""


def _noise(data: bytes) -> Iterator[bytes]:
    yield bytes(range(256)) * 100


def _page(data: bytes) -> Iterator[bytes]:
    page = b"<!DOCTYPE html><title>\x1b[2JLog in</title>"
    yield _answer("200 OK", f"Content-Length: {len(page)}") + page


def _with_headers(status: str, *headers: str) -> Answer:
    def answer(data: bytes) -> Iterator[bytes]:
        yield _answer(status, *headers) + data

    return answer


ANSWERS: dict[str, Answer] = {
    "endless": _endless,
    "longer than said": _longer,
    "endless chunks": _endless_chunks,
    "bad chunks": _bad_chunks,
    "gzip bomb": _gzip_bomb,
    "other encoding": _encoded,
    "trickle": _trickle,
    "slow headers": _slow_headers,
    "endless headers": _endless_headers,
    "endless header": _long_header,
    "endless 100": _endless_continue,
    "silence": _silent,
    "noise": _noise,
    "page": _page,
    "negative length": _with_headers("200 OK", "Content-Length: -5"),
    "length in words": _with_headers("200 OK", "Content-Length: many"),
    "two lengths": _with_headers("200 OK", "Content-Length: 5", "Content-Length: 9"),
    "short length": _with_headers("200 OK", "Content-Length: 5"),
    "redirect to itself": _with_headers("302 Found", "Location: /packed/manifest.json", "Content-Length: 0"),
    "redirect to a file": _with_headers("302 Found", "Location: file:///etc/passwd", "Content-Length: 0"),
    "redirect to nowhere": _with_headers("302 Found", "Location: http://127.0.0.1:9/", "Content-Length: 0"),
    "redirect without a place": _with_headers("302 Found", "Content-Length: 0"),
    "status 999": _with_headers("999 \x1b[31mWhat"),
    "status 204": _with_headers("204 No Content"),
    "status 304": _with_headers("304 Not Modified"),
    "status 429": _with_headers("429 Too Many", "Retry-After: 100000000", "Content-Length: 0"),
    "other range": _with_headers("206 Partial Content", "Content-Range: bytes 7-9/10"),
    "range in words": _with_headers("206 Partial Content", "Content-Range: all of it"),
}

_LISTING = (
    '<?xml version="1.0"?>{}<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{}</ListBucketResult>'
)
_ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 100}">' for n in range(10))
_KEY = (
    "<Contents><Key>{}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>x</ETag><StorageClass>STANDARD</StorageClass></Contents>"
)
_MORE = "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
LISTINGS = {
    "entities": _LISTING.format(f"<!DOCTYPE x [{_ENTITIES}]>", "<Name>&e9;</Name>"),
    "a file as entity": _LISTING.format('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>', "<Name>&e;</Name>"),
    "endless pages": _LISTING.format("", _KEY.format("tars/a.tar", 10240) + _MORE),
    "endless empty pages": _LISTING.format("", _MORE),
    "paths that lead outside": _LISTING.format("", _KEY.format("tars/../../evil.tar", 10240)),
    "control characters": _LISTING.format("", _KEY.format("tars/a%1b[2J&#x85;.tar", 10240)),
    "negative size": _LISTING.format("", _KEY.format("tars/a.tar", -1)),
    "giant size": _LISTING.format("", _KEY.format("tars/a.tar", 10**18)),
    "size in words": _LISTING.format("", _KEY.format("tars/a.tar", "big")),
    "many keys": _LISTING.format("", "".join(_KEY.format(f"tars/{n}.txt", 1) for n in range(20_000))),
    "no XML": "{}",
    "not closed": "<ListBucketResult>" * 10_000,
}


class HostileServer(socketserver.ThreadingTCPServer):
    """Serves `root` as /packed/… over HTTP and as a bucket. Below /HEX/… an answer of `plans` takes the place of files.

    Each plan has a prefix of its own, so that cases may run side by side.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.plans: dict[str, tuple[str, Answer]] = {}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up at any time."""


class _Handler(socketserver.StreamRequestHandler):
    server: HostileServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 150

    def handle(self) -> None:
        request = self.rfile.readline(1 << 16).decode("latin-1").split(" ")
        headers = dict(self._headers())
        if len(request) != 3:
            return
        method, target = request[:2]
        path = urllib.parse.unquote(urllib.parse.urlsplit(target).path).lstrip("/")
        plan, _, name = path.partition("/")
        match, answer = self.server.plans.get(plan, ("never", None))
        with contextlib.suppress(OSError):
            if answer and re.search(match, name + "?" + urllib.parse.urlsplit(target).query):
                for block in answer(self._content(name)):
                    self.wfile.write(block)
            else:
                self.wfile.write(self._right(method, name, headers))

    def _headers(self) -> Iterator[tuple[str, str]]:
        while line := self.rfile.readline(1 << 16).decode("latin-1").strip():
            name, _, value = line.partition(":")
            yield name.lower(), value.strip()

    def _content(self, name: str) -> bytes:
        path = self.server.root / Path(name).name
        return path.read_bytes() if path.is_file() else b""

    def _right(self, method: str, name: str, headers: Mapping[str, str]) -> bytes:
        data = self._content(name)
        if not data:
            return _answer("404 Not Found", "Content-Length: 0")
        size, status, extra = len(data), "200 OK", ["Accept-Ranges: bytes", 'ETag: "x"']
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            first, last = int(found[1]), min(int(found[2] or size), size - 1)
            data, status = data[first : last + 1], "206 Partial Content"
            extra.append(f"Content-Range: bytes {first}-{last}/{size}")
        extra += ["Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", f"Content-Length: {len(data)}"]
        return _answer(status, *extra) + (b"" if method == "HEAD" else data)


_FILES = {"manifest": r"manifest\.json", "index": r"\.index\.npy", "tar": r"\.tar", "all": ""}


def http(server: HostileServer) -> Callable[[Rng, Sandbox], Case]:
    """A data set behind a server that answers wrongly for some of its files."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        kind, file = pick(rng, sorted(ANSWERS)), pick(rng, sorted(_FILES))
        plan = rng.bytes(8).hex()
        server.plans[plan] = _FILES[file], ANSWERS[kind]
        url = f"{server.url}/{plan}/packed"
        commands = [(IMPATIENT, *VERIFY, url, "--workers", "1"), (IMPATIENT, FEED, url)]
        return Case(f"http: {kind}", commands, environment={"XDG_CACHE_HOME": str(sandbox.work / "cache")})

    return make


def s3(server: HostileServer) -> Callable[[Rng, Sandbox], Case]:
    """A bucket whose listing or objects are not what they should be."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        plan = rng.bytes(8).hex()
        if rng.integers(2):
            kind = pick(rng, sorted(LISTINGS))
            body = LISTINGS[kind].encode()
            answer = _with_headers("200 OK", "Content-Type: application/xml", f"Content-Length: {len(body)}")
            server.plans[plan] = "list-type", lambda data: answer(body)
            commands = [(IMPATIENT, *INDEX, f"s3://{plan}/tars", "--out", "out", "--workers", "1")]
        else:
            kind, file = pick(rng, sorted(ANSWERS)), pick(rng, sorted(_FILES))
            server.plans[plan] = _FILES[file], ANSWERS[kind]
            url = f"s3://{plan}/packed"
            commands = [(IMPATIENT, *VERIFY, url, "--workers", "1"), (IMPATIENT, FEED, url)]
        environment = {
            "XDG_CACHE_HOME": str(sandbox.work / "cache"),
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }
        return Case(f"s3: {kind}", commands, environment=environment)

    return make
