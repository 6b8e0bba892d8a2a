"""What a team's tracking server consists of, as real processes on loopback.

    client ──HTTP, basic auth──▶ mlflow server ──▶ PostgreSQL
                                               └─▶ S3 (moto's server)

Everything lies in temporary folders and ends with its context.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.ranks import PATIENCE_S, Rank, free_port
from tests.servers import s3_server

ADMIN, ADMIN_PASSWORD = "admin", "a-password-for-admins"
USER, PASSWORD = "trainer", "a-password-for-jobs"

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """SQLAlchemy's URL of an empty database in a PostgreSQL cluster of its own.

    Skips the test where PostgreSQL is not installed, unless the environment has CI.
    """
    binaries = _postgres_binaries()
    root = os.geteuid() == 0  # PostgreSQL refuses to run as root; its Debian package brings a user for it
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": ()} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not below pytest's folders, which others may not enter
    try:
        if root:
            shutil.chown(folder, "postgres", "postgres")
        options = ["--auth=trust", "--username=mlflow", "--encoding=UTF8", "--locale=C", "--no-sync"]
        _check(subprocess.run(
            [binaries / "initdb", "-D", folder / "data", *options], cwd=folder, capture_output=True, text=True, **user
        ))  # fmt: skip
        port = free_port()
        config = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": folder,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
        }
        command = [binaries / "postgres", "-D", folder / "data"]
        command += [f"--{name}={value}" for name, value in config.items()]
        log = folder / "postgres.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, **user)
        try:
            at = [f"--host={folder}", f"--port={port}", "--username=mlflow"]
            ready = [binaries / "pg_isready", *at, "--quiet"]
            _wait_until(lambda: subprocess.run(ready).returncode == 0, process, log)
            _check(subprocess.run([binaries / "createdb", *at, "mlflow"], capture_output=True, text=True))
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            process.send_signal(signal.SIGQUIT)  # at once, without a last checkpoint
            process.wait()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class ObjectStore:
    endpoint: str
    bucket: str = "artifacts"

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the store needs; an MLflow client needs none of it, its server does."""
        return {**_CREDENTIALS, "MLFLOW_S3_ENDPOINT_URL": self.endpoint}

    def names(self, prefix: str = "") -> list[str]:
        listed = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for item in listed.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=key, Body=data)

    @property
    def _client(self) -> Any:  # boto3 makes its classes at run time
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=_CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=_CREDENTIALS["AWS_DEFAULT_REGION"],
        )


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with one empty bucket."""
    with s3_server() as endpoint:
        store = ObjectStore(endpoint)
        store._client.create_bucket(Bucket=store.bucket)
        yield store


class MlflowServer:
    """`mlflow server` on 127.0.0.1, which can be stopped and started again."""

    def __init__(self, options: list[str], environment: Mapping[str, str], folder: Path) -> None:
        """`folder` gets the log; the options say where the data are."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self._log = folder / "server"
        self._process: Rank | None = None

    def start(self) -> None:
        """On the same port, with the same data; returns when the server answers."""
        assert self._process is None
        self._process = Rank("tests.workers.mlflow_server", self._options, self._environment, self._log)
        _wait_until(self._answers, self._process, self._log.with_suffix(".err"))

    def stop(self) -> None:
        """SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return answer.status == 200
        return False


@contextlib.contextmanager
def mlflow_server(backend: str, store: ObjectStore) -> Iterator[MlflowServer]:
    """A running server over the database `backend`, which knows ADMIN and USER."""
    with tempfile.TemporaryDirectory(prefix="mlflow-server-") as name:
        folder = Path(name)
        options = ["--backend-store-uri", backend, "--artifacts-destination", store.uri, "--app-name", "basic-auth"]
        config = folder / "auth.ini"
        # Without the cache the hash of the password is computed several times a request, which takes half a second.
        config.write_text(f"""[mlflow]
default_permission = READ
database_uri = {backend}
admin_username = {ADMIN}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
""")
        environment = {
            **store.environment,
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the tokens of forms",
        }
        server = MlflowServer(options, environment, folder)
        try:
            server.start()
            _create_user(server.url)
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def credentials(user: str, password: str) -> Iterator[None]:
    """What this process tells a server with basic auth about itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield


def _create_user(url: str) -> None:
    token = base64.b64encode(f"{ADMIN}:{ADMIN_PASSWORD}".encode()).decode()
    body = json.dumps({"username": USER, "password": PASSWORD}).encode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/users/create", body, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert answer.status == 200


def _postgres_binaries() -> Path:
    """Debian keeps them off the PATH."""
    on_path = shutil.which("postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found and on_path:
        found = [Path(on_path).resolve()]
    if not found:
        missing = "no PostgreSQL server here: install Debian's package postgresql"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    return found[-1].parent


def _check(process: subprocess.CompletedProcess[str]) -> None:
    assert process.returncode == 0, f"{process.args[0]}: {process.stderr}"


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any] | Rank, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        tail = f"\n{log.read_text()[-2000:]}"
        assert process.poll() is None, f"{log.stem} ended at once:{tail}"
        assert time.monotonic() < deadline, f"{log.stem} does not answer:{tail}"
        time.sleep(0.05)
