"""MLflow's server of models on loopback, and how to ask it."""

import contextlib
import json
import os
import shlex
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
from mlflow.pyfunc.scoring_server import get_cmd

from tests.ranks import PATIENCE_S, ROOT, Rank, free_port


@dataclass
class ModelServer:
    url: str
    pid: int
    """The process that answers."""
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


@contextlib.contextmanager
def serving(copy: Path, folder: Path, environment: Mapping[str, str]) -> Iterator[ModelServer]:
    """A version's verified copy served from `folder`, which gets the log, until the end of the block.

    In a fork that runs what `mlflow models serve` starts: the command itself imports everything twice, for ten seconds.
    """
    port, log = free_port(), folder / "log"
    host: Any = "127.0.0.1"  # MLflow declares the host to be a number
    command, variables = get_cmd(str(copy), port, host, nworkers=1)
    program, *arguments = shlex.split(command)
    begin = time.monotonic()
    process = Rank(program, arguments, {**variables, **environment}, log, folder)
    try:
        at = ModelServer(f"http://127.0.0.1:{port}", process.pid, copy)
        yield _started(at, process, log.with_suffix(".err"), begin)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def serving_by_command(copy: Path, folder: Path, environment: Mapping[str, str]) -> Iterator[ModelServer]:
    """The same by `mlflow models serve`, as docs/serving.md starts it."""
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
        at = _started(ModelServer(f"http://127.0.0.1:{port}", process.pid, copy), process, log, begin)
        (worker,) = psutil.Process(process.pid).children()
        at.pid = worker.pid
        yield at
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _started(at: ModelServer, process: subprocess.Popen[bytes] | Rank, log: Path, begin: float) -> ModelServer:
    """Waits until it answers."""
    while not _answers(at):
        assert process.poll() is None, f"the server ended at once:\n{log.read_text()[-3000:]}"
        assert time.monotonic() - begin < PATIENCE_S, f"the server does not answer:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
    at.start_up_s = time.monotonic() - begin
    return at


def _answers(at: ModelServer) -> bool:
    with contextlib.suppress(OSError):
        return at.get("/ping")[0] == 200
    return False
