"""`mlflow models serve` on loopback, as docs/serving.md starts it, and how to ask it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import PATIENCE_S, ROOT, free_port


@dataclass
class ModelServer:
    url: str
    process: subprocess.Popen[bytes]
    copy: Path
    """What it serves."""
    start_up_s: float = 0.0

    def post(self, body: Any, kind: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/invocations", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def predictions(self, body: Any, kind: str = "application/json") -> list[dict[str, Any]]:
        status, answer = self.post(body, kind)
        assert status == 200, answer
        return json.loads(answer)["predictions"]

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()

    @property
    def worker(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]


@contextlib.contextmanager
def serving(copy: Path, folder: Path, environment: Mapping[str, str]) -> Iterator[ModelServer]:
    """A version's verified copy served from `folder`, which gets the log, until the end of the block."""
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", copy, "--env-manager", "local"]
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where MLflow looks for uvicorn
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **environment,
    }
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=variables, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        at = ModelServer(f"http://127.0.0.1:{port}", process, copy)
        while not _answers(at):
            assert process.poll() is None, f"the server ended at once:\n{log.read_text()[-3000:]}"
            assert time.monotonic() - begin < PATIENCE_S, f"the server does not answer:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        at.start_up_s = time.monotonic() - begin
        yield at
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(at: ModelServer) -> bool:
    with contextlib.suppress(OSError):
        return at.get("/ping")[0] == 200
    return False
