"""The same bytes from every kind of store, whatever happens on the wire, to the processes or to the cache."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import boto3
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.shards import filesystems
from pipeline.shards.index import read_manifest
from pipeline.shards.index_tars import index_tars
from pipeline.shards.open_files import Descriptors
from pipeline.shards.store import Blob, Cache, Retry, Store, StoreError
from tests.ranks import PATIENCE_S
from tests.servers import Fault, FaultyServer, s3_server

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "un der/50%#1?+été 猫.tar"]
RETRY = Retry(attempts=3, first_wait_s=0.01)
STALL_S = 1.0  # the time-out where one is meant to strike
TRANSIENT: list[Fault] = ["500", "503", "reset", "cut", "short", "stall"]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars with one member of random bytes each, of different sizes."""
    folder = tmp_path_factory.mktemp("originals") / "data"
    draw = random.Random(0)
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / "image.jpg").write_bytes(draw.randbytes(150_000 + 10_000 * number))
        with tarfile.open(path, "w") as tar:
            tar.add(folder.parent / "image.jpg", "image.jpg")
    (folder / "manifest.json").write_text("{}")
    (folder / "un der" / "empty.tar").touch()
    return folder


@pytest.fixture(scope="session")
def moto(originals: Path) -> Iterator[str]:
    with s3_server() as url:
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        for path in originals.rglob("*.*"):
            client.upload_file(str(path), "bucket", f"some/data/{path.relative_to(originals)}")
        client.close()
        yield url


@dataclass
class Place:
    """Somewhere the originals are kept; `server` where that is on the wire."""

    root: str
    originals: Path
    folder: Path
    server: FaultyServer | None

    def data(self, name: str) -> bytes:
        return (self.originals / name).read_bytes()

    def blob(self, name: str = NAMES[0]) -> Blob:
        data = self.data(name)
        return Blob(name, len(data), hashlib.sha256(data).hexdigest())

    @property
    def blobs(self) -> list[Blob]:
        return [self.blob(name) for name in NAMES]

    def cache(self, budget_bytes: int = 1 << 30, in_use_s: float = 60.0, folder: str = "cache") -> Cache:
        return Cache(self.folder / folder, budget_bytes, in_use_s=in_use_s)

    @contextlib.contextmanager
    def store(self, cache: Cache | None = None, retry: Retry = RETRY, timeout_s: float = 10) -> Iterator[Store]:
        with contextlib.closing(Store(self.root, cache or self.cache(), retry=retry, timeout_s=timeout_s)) as store:
            yield store

    @property
    def wire(self) -> FaultyServer:
        assert self.server
        return self.server


def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def http(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    _loopback(monkeypatch)
    with FaultyServer(originals.parent) as server:
        yield Place(f"{server.url}/data", originals, tmp_path, server)


@pytest.fixture
def s3(originals: Path, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    _loopback(monkeypatch)
    with FaultyServer(moto) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            monkeypatch.setenv(name, value)
        yield Place("s3://bucket/some/data", originals, tmp_path, server)


@pytest.fixture
def local(originals: Path, tmp_path: Path) -> Place:
    return Place(str(originals), originals, tmp_path, None)


@pytest.fixture
def memory(originals: Path, tmp_path: Path) -> Iterator[Place]:
    """fsspec's own store, for the protocols that nothing here knows by name."""
    fs = fsspec.filesystem("memory")
    fs.put(f"{originals}/", "/data/", recursive=True)
    yield Place("memory://data", originals, tmp_path, None)
    fs.rm("/data", recursive=True)


@pytest.fixture(params=["local", "http", "s3", "memory"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["http", "s3"])
def remote(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


# ---- every store


def test_every_read_method_gives_the_file_bytes(place: Place) -> None:
    draw = random.Random(1)
    with place.store() as store:
        assert store.read("manifest.json") == b"{}"
        assert store.is_local == (place.root == str(place.originals))
        for blob in place.blobs:
            data = place.data(blob.name)
            assert store.size(blob.name) == len(data)
            assert store.load(blob) == data
            for way in (store.pread, store.pread_origin, store.pread):
                offset = draw.randrange(len(data))
                size = draw.randint(0, len(data) - offset)
                assert way(blob, offset, size) == data[offset : offset + size]
            with store.open(blob.name) as file:
                assert file.read() == data
                assert file.seek(-1000, os.SEEK_END) == len(data) - 1000
                assert file.read(5000) == data[-1000:]
            with store.open(blob.name) as file, tarfile.open(fileobj=file) as tar:
                member = tar.extractfile("image.jpg")
                assert member
                assert member.read() in data
        assert store.load(place.blob("un der/empty.tar")) == b""
        assert store.url("x.tar") == f"{place.root}/x.tar"


def test_missing_file_is_reported_without_retries(place: Place) -> None:
    nowhere = Blob("no.tar", 5, "0" * 64)
    started = time.monotonic()
    with place.store(retry=Retry(first_wait_s=10)) as store:
        assert store.size("no.tar") is None
        assert store.size("un der") is None
        for ask in (store.read, store.open):
            with pytest.raises(FileNotFoundError, match=r"no\.tar"):
                ask("no.tar")
        for read in (store.pread, store.pread_origin):
            with pytest.raises(StoreError, match=r"no\.tar: no such file, but the data set lists it"):
                read(nowhere, 0, 5)
        with pytest.raises(StoreError, match=r"no\.tar: no such file"):
            store.load(nowhere)
    assert time.monotonic() - started < 5, "what is missing is not tried again"


def test_names_lists_a_folder_and_rejects_http(place: Place) -> None:
    with place.store() as store:
        if place.root.startswith("http"):
            with pytest.raises(InputError, match="HTTP has no listing"):
                store.names()
        else:
            assert store.names() == sorted([*NAMES, "manifest.json", "un der/empty.tar"])


def test_file_url_is_a_local_folder(local: Place) -> None:
    with contextlib.closing(Store(f"file://{local.root}")) as store:
        assert store.is_local
        assert store.load(local.blob()) == local.data(NAMES[0])
        store.prefetch(local.blobs)
    assert not list(local.folder.iterdir())


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "a/../../x", "", "a//b", "x\0.tar", "./x", "a\\b", "a\nb", "\udce9"]
)
def test_names_outside_the_root_are_rejected(place: Place, name: str) -> None:
    with pytest.raises(InputError, match="not a file below"):
        Blob(name, 1, "0" * 64)
    with place.store() as store:
        for ask in (store.size, store.read, store.open, store.url):
            with pytest.raises(InputError, match="not a file below"):
                ask(name)


@pytest.mark.parametrize("sha256", ["../" + "0" * 61, "0" * 63, "A" * 64, ""])
def test_invalid_sha256_is_rejected(sha256: str) -> None:
    with pytest.raises(InputError, match="SHA-256"):
        Blob("x.tar", 1, sha256)


def test_load_rejects_a_changed_local_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"two")
    with contextlib.closing(Store(tmp_path)) as store, pytest.raises(StoreError, match=f"{tmp_path}/x: does not match"):
        store.load(Blob("x", 3, hashlib.sha256(b"one").hexdigest()))


def test_descriptors_are_bounded_across_threads(local: Place) -> None:
    contents = {name: local.data(name) for name in NAMES}
    files = Descriptors[str](lambda name: os.open(local.originals / name, os.O_RDONLY), max_open=2)

    def read(number: int) -> bool:
        draw = random.Random(number)
        name, offset = draw.choice(NAMES), draw.randrange(100_000)
        return files.pread(name, offset, 999) == contents[name][offset : offset + 999]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(2000)))
    assert _num_open(local.originals) == 2
    files.close()
    assert _num_open(local.originals) == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40), st.integers(0, 1 << 20)), max_size=12))
def test_descriptors_read_the_file_bytes(originals: Path, reads: list[tuple[int, int, int]]) -> None:
    files = Descriptors[str](lambda name: os.open(originals / name, os.O_RDONLY), max_open=2)
    for number, offset, size in reads:
        assert files.pread(NAMES[number], offset, size) == (originals / NAMES[number]).read_bytes()[offset:][:size]
    files.close()
    assert _num_open(originals) == 0


def _num_open(folder: Path) -> int:
    """Descriptors of this process on files below a folder, deleted ones among them."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    found = 0
    for link in links:
        with contextlib.suppress(FileNotFoundError):
            found += str(link.readlink()).startswith(str(folder))
    return found


def test_unknown_protocol_is_rejected() -> None:
    with pytest.raises(InputError, match="nope://x: cannot be opened"):
        Store("nope://x", Cache(tempfile.mkdtemp(), 0))


# ---- faults on the wire


@pytest.mark.parametrize("fault", [*TRANSIENT, "flip"])
def test_transient_faults_are_retried(remote: Place, fault: Fault, capfd: pytest.CaptureFixture[str]) -> None:
    blob, data = remote.blob(), remote.data(NAMES[0])
    other, other_data = remote.blob(NAMES[2]), remote.data(NAMES[2])
    ways: dict[str, Callable[[Store], bool]] = {
        "pread": lambda store: store.pread(blob, 1000, 2000) == data[1000:3000],
        "load": lambda store: store.load(other) == other_data,
        "pread_origin": lambda store: store.pread_origin(blob, 1000, 2000) == data[1000:3000],
        "open": lambda store: store.open(blob.name).read() == data,
        "read": lambda store: store.read(blob.name) == data,
    }
    if fault == "flip":  # which only digests tell
        del ways["pread_origin"], ways["open"]
    if fault in ("flip", "short"):  # which nothing tells
        del ways["read"]
    if fault == "stall":  # which takes its time
        del ways["load"], ways["open"]
    with remote.store(timeout_s=STALL_S if fault == "stall" else 10) as store:
        store.size(NAMES[1])  # connects
        for name, is_right in ways.items():
            remote.wire.spoil(fault)
            assert is_right(store), name
            (line,) = capfd.readouterr().err.splitlines()
            url = store.url(other.name if name == "load" else blob.name)
            assert line.startswith(f"{url}: "), name
            assert "attempt 2 of 3 in 0.0 s" in line


@pytest.mark.parametrize("fault", [*TRANSIENT, "flip"])
def test_permanent_fault_raises_an_error_naming_the_file(remote: Place, fault: Fault) -> None:
    blob = remote.blob()
    remote.wire.spoil(fault, times=float("inf"))
    ways: list[Callable[[Store], object]] = [lambda store: store.pread(blob, 0, 10)]
    if fault == "flip":
        ways += [lambda store: store.load(blob)]
    elif fault != "stall":
        ways += [lambda store: store.pread_origin(blob, 0, 10)]
    with remote.store(timeout_s=STALL_S if fault == "stall" else 10) as store:
        store.size(NAMES[1])  # connects
        for way in ways:
            before, started = len(remote.wire.gets()), time.monotonic()
            with pytest.raises(StoreError) as error:
                way(store)
            assert time.monotonic() - started < 60
            assert str(error.value).startswith(f"{remote.root}/{NAMES[0]}: ")
            assert str(error.value).endswith("given up after 3 attempts")
            assert len(remote.wire.gets()) - before == 3
            assert not _held(remote.cache())
        remote.wire.heal()
        assert store.load(blob) == remote.data(NAMES[0])


def test_trickling_response_times_out(http: Place) -> None:
    http.wire.spoil("trickle", times=float("inf"))
    started = time.monotonic()
    with http.store(retry=Retry(1), timeout_s=STALL_S) as store, pytest.raises(StoreError, match="timed out"):
        store.pread_origin(http.blob(), 0, 10_000)
    assert time.monotonic() - started < 100  # of the 500 s that it takes


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("endless", r"more than 1,000 bytes$"),
        ("gzip", r"the server sends it encoded \(gzip\): serve the file as it is$"),
    ],
)
def test_endless_or_encoded_small_file_is_rejected_without_retries(http: Place, fault: Fault, reason: str) -> None:
    http.wire.spoil(fault, times=float("inf"))
    with http.store() as store, pytest.raises(StoreError, match=f"^{http.root}/{NAMES[0]}: {reason}"):
        store.read(NAMES[0], 1000)
    assert len(http.wire.gets()) == 1


def test_endless_response_uses_bounded_memory(http: Place) -> None:
    http.wire.spoil("endless", times=float("inf"))
    blob = http.blob()
    with http.store() as store:
        tracemalloc.start()
        try:
            found = store.pread_origin(Blob(blob.name, 1 << 40, blob.sha256), 0, 1000)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()
    assert found == http.data(blob.name)[:1000]


def test_trickling_small_file_is_given_up(http: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "READ_BYTES", 0)
    http.wire.spoil("trickle", times=float("inf"))
    started = time.monotonic()
    given_up = pytest.raises(StoreError, match=r"timed out; given up after [12] attempts?$")
    with http.store(retry=Retry(6, 0.01, last_start_s=1.0), timeout_s=0.5) as store, given_up:
        store.read(NAMES[0], 1 << 20)
    assert time.monotonic() - started < 30  # of the hours that it takes


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def itself(path: Path) -> None:
    path.symlink_to(path)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe, "not a regular file"),
        (device, "not a regular file"),
        (folder, "Is a directory"),
        (itself, "Too many levels of symbolic links"),
        (sparse, "more than 4,194,304 bytes"),
    ],
)
def test_irregular_or_oversized_local_file_is_rejected_without_retries(
    tmp_path: Path, make: Callable[[Path], None], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "x")
    blob = Blob("x", 10, "0" * 64)
    with contextlib.closing(Store(tmp_path)) as store:
        ways = [lambda: store.read("x"), lambda: store.pread(blob, 0, 10), lambda: store.open("x")]
        for way in ways if make is not sparse else ways[:1]:
            with pytest.raises((StoreError, OSError), match=reason):
                way()
    assert capfd.readouterr().err == "", "nothing is tried again"


def test_server_error_is_not_a_missing_file(remote: Place) -> None:
    with remote.store() as store:
        for method in ("HEAD", "GET"):
            remote.wire.spoil("500", times=2, method=method)
        assert store.size(NAMES[0]) == len(remote.data(NAMES[0]))
        for method in ("HEAD", "GET"):
            remote.wire.spoil("500", times=float("inf"), method=method)
        with pytest.raises(StoreError, match=NAMES[0]):
            store.size(NAMES[0])


def test_forbidden_requests_are_not_retried(remote: Place) -> None:
    remote.wire.spoil("403", times=float("inf"))
    with remote.store() as store:
        for read in (lambda: store.read(NAMES[0]), lambda: store.pread(remote.blob(), 0, 10)):
            before = len(remote.wire.gets())
            with pytest.raises(StoreError, match=f"{remote.root}/{NAMES[0]}: .*(403|Forbidden)"):
                read()
            assert len(remote.wire.gets()) == before + 1


@pytest.mark.parametrize("fault", ["400", "401", "403"])
def test_http_4xx_is_reported_in_one_line_with_a_remedy(remote: Place, fault: Fault, tmp_path: Path) -> None:
    for method in ("HEAD", "GET"):
        remote.wire.spoil(fault, times=float("inf"), method=method)
    remedy = "AWS_ENDPOINT_URL" if fault == "400" else "access is denied: set AWS_ACCESS_KEY_ID .*expired: renew it"
    with remote.store() as store:
        for ask in (store.size, store.read, store.open):
            with pytest.raises(StoreError, match=f"^{remote.root}/{NAMES[0]}: HTTP {fault} .*{remedy}"):
                ask(NAMES[0])
    with pytest.raises(StoreError, match=f"HTTP {fault} .*{remedy}"):
        index_tars(f"{remote.root}/shard-{{000000..000001}}.tar", tmp_path / "out")


@pytest.mark.parametrize("fault", ["400", "403", "405"])
def test_server_that_rejects_head_is_read_with_get(http: Place, fault: Fault) -> None:
    """As a URL that was signed for GET alone."""
    http.wire.spoil(fault, times=float("inf"), method="HEAD")
    with http.store() as store:
        assert store.size(NAMES[0]) == len(http.data(NAMES[0]))
        assert store.open(NAMES[0]).read() == http.data(NAMES[0])


def test_missing_bucket_is_reported(s3: Place, tmp_path: Path) -> None:
    for ask in (lambda: index_tars("s3://no-such/data", tmp_path / "out"), lambda: read_manifest("s3://no-such/data")):
        with pytest.raises(InputError, match=r"s3://no-such/data.*: no such bucket: check its name, and AWS_ENDPOINT"):
            ask()


def test_missing_s3_credentials_are_reported(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3.store() as store, pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        store.read(NAMES[0])


def test_index_lists_an_s3_prefix_once(s3: Place, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not one sample can be used"):
        index_tars(s3.root, tmp_path / "out", labels="cls", skip_bad=True)
    assert len([request for request in s3.wire.requests if "list-type=2" in request.query]) == 1


def test_unreachable_server_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _loopback(monkeypatch)
    with contextlib.closing(Store("http://127.0.0.1:9/data", Cache(tmp_path, 1 << 20), retry=RETRY)) as store:
        for read in (lambda: store.size("x.tar"), lambda: store.pread(Blob("x.tar", 1, "0" * 64), 0, 1)):
            with pytest.raises(StoreError, match=r"^http://127\.0\.0\.1:9/data/x\.tar: .*Cannot connect"):
                read()


@pytest.mark.parametrize("budget_bytes", [1 << 30, 0])
def test_server_that_ignores_range_requests_is_read(
    http: Place, budget_bytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    http.wire.spoil("ignore range", times=float("inf"))
    with http.store(http.cache(budget_bytes)) as store:
        for blob in http.blobs:
            for offset in (0, 1, 70_000):
                assert store.pread(blob, offset, 1000) == http.data(blob.name)[offset : offset + 1000]
        with store.open(NAMES[0]) as file:
            assert file.read() == http.data(NAMES[0])
    assert capfd.readouterr().err.count("ignores Range") == (budget_bytes == 0)


def test_url_query_is_read_from_the_environment(http: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    http.root += "?$TRAIN_QUERY"
    with pytest.raises(InputError, match=r"\?\$TRAIN_QUERY, but TRAIN_QUERY has no value"), http.store():
        pass
    for value in ("sig=a%2Fb$x", "?sig=a%2Fb$x"):
        monkeypatch.setenv("TRAIN_QUERY", value)
        with http.store() as store:
            assert store.load(http.blob()) == http.data(http.blob().name)
            assert "sig" not in f"{store.root} {store.url('x')}"
    assert {request.query for request in http.wire.requests} == {"sig=a%2Fb$x"}


def test_credentials_are_used_and_never_shown(http: Place, capfd: pytest.CaptureFixture[str]) -> None:
    http.root = http.root.replace("http://", "http://us3r:s3cret@") + "?sig=t0ken%2B%2F+&x=1"
    blob = http.blob()
    with http.store() as store:
        assert store.load(blob) == http.data(blob.name)
        assert store.size(blob.name) == blob.bytes
        assert {request.headers["Authorization"] for request in http.wire.requests} == {"Basic dXMzcjpzM2NyZXQ="}
        assert all(request.query == "sig=t0ken%2B%2F+&x=1" for request in http.wire.requests)
        shown = [store.root, store.url("x"), repr(store)]
        for fault in ("500", "reset", "cut", "short", "403", "flip"):
            http.wire.heal()
            http.wire.spoil(fault, times=float("inf"))
            http.wire.spoil(fault, times=float("inf"), method="HEAD")
            for read in (store.read, store.size, lambda name: store.pread(http.blob(NAMES[1]), 0, 10)):
                try:
                    read(blob.name)
                except StoreError:
                    shown.append(traceback.format_exc())
        http.wire.heal()
        with pytest.raises(FileNotFoundError) as missing:
            store.read("no.tar")
        shown += traceback.format_exception(missing.value)
    assert len(shown) > 15
    out, err = capfd.readouterr()
    for text in [*shown, out, err]:
        assert not {word for word in ("us3r", "s3cret", "t0ken", "sig=") if word in text}, text


# ---- the cache


def _age(cache: Cache, *blobs: Blob) -> None:
    for age_s, blob in enumerate(reversed(blobs), 1000):
        os.utime(cache.path(blob.sha256), (time.time() - age_s, time.time() - age_s))


def _held(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.name != "ledger"}


def test_shard_is_fetched_once_and_shared_by_stores(remote: Place) -> None:
    cache, blob = remote.cache(), remote.blob()
    for _ in range(2):
        with remote.store(cache) as store, ThreadPoolExecutor(8) as pool:
            wanted = [(offset, 1000) for offset in range(0, 100_000, 1000)]
            got = list(pool.map(lambda at: store.pread(blob, *at), wanted))
            assert b"".join(got) == remote.data(blob.name)[:100_000]
    assert len(remote.wire.gets(NAMES[0])) == 1
    assert _held(cache) == {blob.sha256}
    assert _num_open(cache.folder) == 0


def test_waiting_thread_takes_over_a_failed_download(tmp_path: Path) -> None:
    cache, sha256 = Cache(tmp_path, 100), "0" * 64
    begun, fail, written = threading.Event(), threading.Event(), []

    def fails(descriptor: int) -> None:
        begun.set()
        fail.wait(PATIENCE_S)
        raise StoreError("away")

    def works(descriptor: int) -> None:
        written.append(os.pwrite(descriptor, b"data", 0))

    with ThreadPoolExecutor(3) as pool:
        failing = pool.submit(cache.fetch, sha256, 4, fails)
        assert begun.wait(PATIENCE_S)
        waiting = [pool.submit(cache.fetch, sha256, 4, works) for _ in range(2)]
        time.sleep(0.1)
        assert not written
        fail.set()
        assert isinstance(failing.exception(), StoreError)
        assert all(fetch.result() for fetch in waiting)
    assert written == [4]
    assert cache.path(sha256).read_bytes() == b"data"


def test_threads_share_one_failed_download(http: Place) -> None:
    http.wire.spoil("stall", times=float("inf"))
    started = time.monotonic()
    with http.store(retry=Retry(2, 0.01), timeout_s=STALL_S) as store, ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(store.pread, http.blob(), 0, 10) for _ in range(16)]
        assert all(isinstance(read.exception(), StoreError) for read in reads)
    assert len(http.wire.gets()) == 2
    assert time.monotonic() - started < 16 * STALL_S  # one after the other they would take twice that


def test_cache_evicts_least_recently_used_but_nothing_in_use(http: Place, capfd: pytest.CaptureFixture[str]) -> None:
    first, second, third, fourth = http.blobs
    cache = http.cache(first.bytes + second.bytes + third.bytes + fourth.bytes - 1)
    with http.store(cache) as store:
        for blob in (first, second, third):
            store.pread(blob, 0, 10)
        before = len(http.wire.gets())
        assert store.pread(fourth, 7, 10) == http.data(fourth.name)[7:17]
        assert http.wire.gets()[before].headers["Range"] == "bytes=7-16", "all is in use: one sample, not the shard"
        assert _held(cache) == {first.sha256, second.sha256, third.sha256}
    _age(cache, second, first, third)
    with http.store(http.cache(cache.budget_bytes)) as store:  # as another process
        store.pread(second, 0, 10)  # makes it the newest
        store.pread(fourth, 0, 10)
        assert _held(cache) == {second.sha256, third.sha256, fourth.sha256}
    (line,) = capfd.readouterr().err.splitlines()
    assert "budget of 0.00" in line
    assert "Raise the cache's budget" in line


def test_cache_budget_below_one_shard_reads_ranges(remote: Place, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(2)
    with remote.store(remote.cache(100_000)) as store:
        for _ in range(20):
            blob, offset = draw.choice(remote.blobs), draw.randrange(100_000)
            assert store.pread(blob, offset, 5000) == remote.data(blob.name)[offset : offset + 5000]
        assert not _held(remote.cache())
    assert all("Range" in request.headers for request in remote.wire.gets())
    assert len(capfd.readouterr().err.splitlines()) == 1, "said once"


def test_evicted_files_are_closed(http: Place) -> None:
    cache = http.cache(200_000, in_use_s=0)
    with http.store(cache) as store:
        for _ in range(3):
            for blob in http.blobs:
                assert store.pread(blob, 0, 10) == http.data(blob.name)[:10]
                assert _num_open(cache.folder) == 1


def test_damaged_cached_shard_is_replaced(remote: Place) -> None:
    cache, blob = remote.cache(), remote.blob()
    data = remote.data(blob.name)
    with remote.store(cache) as store, remote.store(cache) as other:
        assert store.pread(blob, 0, 10) == other.pread(blob, 0, 10) == data[:10]
        with cache.path(blob.sha256).open("r+b") as file:
            file.seek(5)
            file.write(b"\0\0\0")
        assert store.pread(blob, 0, 10) == other.pread(blob, 0, 10) != data[:10]
        assert store.pread_origin(blob, 0, 10) == data[:10]
        assert _held(cache) == set()
        assert store.pread(blob, 0, 10) == data[:10]
        fetches = len(remote.wire.gets())
        # The other process still has the damaged copy open, and may not drop the sound one that has replaced it.
        assert other.pread(blob, 0, 10) != data[:10]
        assert other.pread_origin(blob, 0, 10) == data[:10]
        assert other.pread(blob, 0, 10) == data[:10]
        assert len(remote.wire.gets()) == fetches + 1


def test_load_replaces_a_damaged_cached_shard(remote: Place) -> None:
    cache, blob = remote.cache(), remote.blob()
    with remote.store(cache) as store:
        store.load(blob)
        cache.path(blob.sha256).write_bytes(b"\0" * blob.bytes)
        assert store.load(blob) == remote.data(blob.name)
        assert store.load(blob) == remote.data(blob.name)
    assert hashlib.sha256(cache.path(blob.sha256).read_bytes()).hexdigest() == blob.sha256


def test_cached_shard_of_another_size_is_discarded(http: Place) -> None:
    cache, blob = http.cache(), http.blob()
    cache.path(blob.sha256).write_bytes(http.data(blob.name)[:-1])
    with http.store(cache) as store:
        assert store.pread(blob, 0, 10) == http.data(blob.name)[:10]
        assert cache.path(blob.sha256).stat().st_size == blob.bytes
        os.truncate(cache.path(blob.sha256), 5)  # while it is open
        assert store.pread(blob, 0, 10) == http.data(blob.name)[:10]
        assert store.pread(blob, 0, 10) == http.data(blob.name)[:10]
        assert cache.path(blob.sha256).stat().st_size == blob.bytes


def test_prefetched_shards_need_no_more_requests(remote: Place) -> None:
    cache = remote.cache()
    with remote.store(cache) as store:
        for _ in range(3):
            store.prefetch(remote.blobs)
        _wait_until(lambda: _held(cache) == {blob.sha256 for blob in remote.blobs})
        remote.wire.spoil("500", times=float("inf"))
        for blob in remote.blobs:
            assert store.pread(blob, 5, 1000) == remote.data(blob.name)[5:1005]
        store.prefetch(remote.blobs)
    assert len(remote.wire.gets()) == len(NAMES)


def test_prefetch_errors_are_raised_by_the_read(http: Place) -> None:
    http.wire.spoil("403", times=float("inf"))
    with http.store() as store:
        store.prefetch(http.blobs)
        _wait_until(lambda: len(http.wire.gets()) == len(NAMES))
        with pytest.raises(StoreError, match="403"):
            store.pread(http.blob(), 0, 10)
        http.wire.heal()
        store.prefetch(http.blobs)
        _wait_until(lambda: len(_held(http.cache())) == len(NAMES))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_full_disk_falls_back_to_range_reads(http: Place, capfd: pytest.CaptureFixture[str]) -> None:
    small = http.folder / "small"
    small.mkdir()
    blob, data = http.blob(), http.data(NAMES[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with http.store(Cache(small, 1 << 30)) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            assert store.pread(blob, 50_000, 1000) == data[50_000:51_000]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert http.wire.gets()[-1].headers["Range"] == "bytes=50000-50999"
    assert not _held(Cache(small, 0))
    assert "File too large; samples are read from their origin" in capfd.readouterr().err


def test_default_cache_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = Cache.default()
    assert cache.folder == tmp_path / f"pvt-shards-{os.getuid()}"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert cache.budget_bytes == pytest.approx(shutil.disk_usage(tmp_path).free / 2, rel=0.2)
    assert Cache.default(budget_bytes=5).budget_bytes == 5
    assert Cache.default(tmp_path / "mine").folder == tmp_path / "mine"
    cache.folder.chmod(0o777)
    with pytest.raises(InputError, match="cannot be trusted"):
        Cache.default()
    (cache.folder / "ledger").unlink()
    cache.folder.rmdir()
    cache.folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="cannot be trusted"):
        Cache.default()


def test_unwritable_cache_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path}/file/cache: cannot be used as a cache"):
        Cache(tmp_path / "file" / "cache", 1)


# ---- several processes


Walk = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Starts a process that reads random samples of a place; see tests/workers/walk.py."""
    processes = []

    def start(
        place: Place,
        *,
        seed: int,
        reads: int,
        names: list[str],
        cache: str = "cache",
        budget: int = 1 << 30,
        in_use=60.0,
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.workers.walk", place.root, place.originals, place.folder / cache]
        process = subprocess.Popen(
            [str(word) for word in [*command, budget, in_use, seed, reads, *names]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _expect_right(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["wrong"] == 0


def test_two_processes_fetch_a_shard_once(remote: Place, walk: Walk) -> None:
    remote.wire.spoil("slow")
    _expect_right(*[walk(remote, seed=seed, reads=20, names=NAMES[:1]) for seed in range(2)])
    assert len(remote.wire.gets(NAMES[0])) == 1


def test_killed_download_is_taken_over_by_another_process(remote: Place, walk: Walk) -> None:
    remote.wire.spoil("stall")
    process = walk(remote, seed=0, reads=1, names=NAMES[:1])
    _wait_until(lambda: bool(remote.wire.gets(NAMES[0])))
    waiting = walk(remote, seed=1, reads=5, names=NAMES[:1])
    assert waiting.stdout
    assert waiting.stdout.readline() == "ready\n"
    time.sleep(0.3)
    assert waiting.poll() is None
    cache, blob = remote.cache(), remote.blob()
    assert _held(cache) == {blob.sha256 + ".partial"}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _expect_right(waiting)
    assert len(remote.wire.gets(NAMES[0])) == 2
    assert _held(cache) == {blob.sha256}


def test_partial_file_of_a_killed_process_is_evicted(http: Place, walk: Walk) -> None:
    http.wire.spoil("stall")
    process = walk(http, seed=0, reads=1, names=NAMES[:1])
    _wait_until(lambda: bool(http.wire.gets(NAMES[0])))
    process.kill()
    process.communicate()
    last = http.blob(NAMES[-1])
    cache = http.cache(last.bytes)
    assert _held(cache) == {http.blob().sha256 + ".partial"}
    with http.store(cache) as store:
        assert store.pread(last, 0, 10) == http.data(last.name)[:10]
    assert _held(cache) == {last.sha256}


def test_cache_budget_holds_across_two_processes(remote: Place, walk: Walk) -> None:
    budget = sum(blob.bytes for blob in remote.blobs[:2]) + 50_000
    most = 0
    ended = threading.Event()
    folder = remote.cache().folder

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.001):
            # While the ledger is locked nothing grows, so that the sum is one that has really been.
            with (folder / "ledger").open() as ledger, contextlib.suppress(FileNotFoundError):
                fcntl.flock(ledger, fcntl.LOCK_EX)
                most = max(most, sum(path.stat().st_size for path in folder.iterdir() if path.name != "ledger"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    walks = [walk(remote, seed=seed, reads=150, names=NAMES, budget=budget, in_use=0.0) for seed in range(2)]
    _expect_right(*walks)
    ended.set()
    thread.join()
    assert budget - 150_000 < most <= budget
    whole = [request for request in remote.wire.gets() if request.headers["Range"].startswith("bytes=0-1")]
    assert len(whole) > 20, "too few evictions to prove anything"


def test_each_node_fetches_each_shard_once(http: Place, walk: Walk) -> None:
    walks = [
        walk(http, seed=10 * node + rank, reads=60, names=NAMES, cache=f"node-{node}")
        for node in range(2)
        for rank in range(2)
    ]
    _expect_right(*walks)
    for name in NAMES:
        assert len(http.wire.gets(name)) == 2
