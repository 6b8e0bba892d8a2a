"""Real servers on loopback for the tests of stores: HTTP whose answers can be spoiled, and S3.

    client ──▶ FaultyServer ──▶ files of a folder
    client ──▶ FaultyServer ──▶ moto's S3 server

Faults happen on the wire in front of a server that works, so both protocols meet the same ones.
"""

import contextlib
import email.message
import gzip
import http.client
import http.server
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.ranks import PATIENCE_S

Fault = Literal[
    "400",
    "401",
    "403",
    "405",
    "500",
    "503",
    "reset",  # half the body, then a TCP reset
    "cut",  # half the body that Content-Length promises, then an orderly end
    "short",  # half the body, and Content-Length says so
    "stall",  # half the body, then silence until the server ends
    "trickle",  # half the body, then a byte every 0.1 s
    "flip",  # one byte differs
    "ignore range",  # 200 and the whole file
    "slow",  # right, half a second late
    "endless",  # the body over and over, until the client leaves
    "gzip",  # Content-Encoding says so, and blocks of zeros expand a thousandfold
]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Unquoted, without the query."""
    query: str
    headers: email.message.Message


@dataclass
class _Plan:
    fault: Fault
    times: float
    match: str
    method: str


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder, or whatever `source` is the URL of. `requests` are those that came, in order."""

    daemon_threads = True
    request_queue_size = 64
    block_on_close = False

    def __init__(self, source: Path | str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.source = source
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._plans: list[_Plan] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def spoil(self, fault: Fault, times: float = 1, match: str = "", method: str = "GET") -> None:
        """Spoil the next `times` answers to requests whose path `match` is found in."""
        with self._lock:
            self._plans.append(_Plan(fault, times, match, method))

    def heal(self) -> None:
        with self._lock:
            self._plans.clear()

    def gets(self, match: str = "") -> list[Request]:
        """The requests for content so far."""
        return [r for r in list(self.requests) if r.method == "GET" and match in r.path]

    def note(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for plan in self._plans:
                if plan.times > 0 and plan.method == request.method and plan.match in request.path:
                    plan.times -= 1
                    return plan.fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that were killed or gave up are part of the tests."""

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def faulty(self) -> FaultyServer:
        assert isinstance(self.server, FaultyServer)
        return self.server

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        request = Request(self.command, urllib.parse.unquote(parts.path), parts.query, self.headers)
        fault = self.faulty.note(request)
        if fault in ("400", "401", "403", "405", "500", "503"):
            self._answer(int(fault), {}, b"")
            return
        if fault == "ignore range":
            del self.headers["Range"]
        status, headers, body = self._upstream() if isinstance(self.faulty.source, str) else self._file(request.path)
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "slow":
            time.sleep(0.5)
        if fault in ("endless", "gzip"):
            self._never_end(fault, body)
            return
        if fault not in ("reset", "cut", "stall", "trickle"):
            self._answer(status, headers, body)
            return
        half = len(body) // 2
        self._answer(status, headers, body, send=body[:half])
        self.close_connection = True
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "stall":
            self.faulty.ended.wait()
        elif fault == "trickle":
            for byte in body[half:]:
                if self.faulty.ended.wait(0.1):
                    break
                self.wfile.write(bytes([byte]))

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes, send: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else send)

    def _never_end(self, fault: Fault, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
            body = gzip.compress(bytes(1 << 24))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while not self.faulty.ended.is_set():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        self.close_connection = True

    def _file(self, path: str) -> tuple[int, dict[str, str], bytes]:
        assert isinstance(self.faulty.source, Path)
        file = self.faulty.source / path.lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, {}, file.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first > last:
            return 416, {}, b""
        with file.open("rb") as content:
            content.seek(first)
            body = content.read(last + 1 - first)
        return 206, {"Content-Range": f"bytes {first}-{last}/{size}"}, body

    def _upstream(self) -> tuple[int, dict[str, str], bytes]:
        assert isinstance(self.faulty.source, str)
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.faulty.source).netloc, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
        dropped = {"connection", "date", "server", "transfer-encoding"}
        if self.command != "HEAD":
            dropped.add("content-length")
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, {name: value for name, value in headers.items() if name not in dropped}, body

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a fresh S3 server that checks no credentials."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, "moto's server ended at once"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
