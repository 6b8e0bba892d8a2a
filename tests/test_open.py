"""A run's data is opened in one way: through the cache that it is told to use, and only where it needs one."""

import argparse
import ast
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.shards.cache import CacheOptions
from pipeline.shards.open_data import open_data, open_training, open_validation
from pipeline.shards.verify import verify
from tests.ranks import ROOT
from tests.servers import FaultyServer

Settings = Callable[..., Config]


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache, which does not exist yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp" / f"pvt-shards-{os.getuid()}"


@pytest.fixture
def server(digits: Path) -> Iterator[FaultyServer]:
    with FaultyServer(digits) as server:
        yield server


def test_remote_shards_are_cached_in_the_configured_folder(
    make_config: Settings, server: FaultyServer, tmp_path: Path, default: Path
) -> None:
    data = [f"data.train={server.url}/train", f"data.val={server.url}/val"]
    chosen = make_config(*data, f"data.cache={tmp_path}/chosen", "data.cache_gb=0.0012").data
    validation = open_validation(chosen)
    assert validation
    for shards in (open_training(chosen), validation):
        shards.read(0, 0)
        assert (tmp_path / "chosen" / shards.manifests[0].shards[0].sha256).exists()
    for number in range(8):
        open_training(chosen).read(number, 0)
    assert sum(path.stat().st_size for path in (tmp_path / "chosen").iterdir()) < 1_200_100
    assert not default.exists()
    open_training(make_config(*data).data).read(0, 0)
    assert default.exists()


def test_local_data_is_opened_without_a_cache(make_config: Settings, tmp_path: Path) -> None:
    """The folder may be on the disk of the node that has trained."""
    (tmp_path / "file").touch()
    open_training(make_config(f"data.cache={tmp_path}/file/cache").data).read(0, 0)
    assert make_config("data.val=null").data.val is None
    assert open_validation(make_config("data.val=null").data) is None


def test_unusable_cache_folder_is_rejected_on_open(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("$NO_SUCH_FOLDER/shards", "${NO_SUCH_FOLDER}/shards"):
        with pytest.raises(
            InputError, match=r"NO_SUCH_FOLDER}?/shards: names a variable that has no value here: set it"
        ):
            open_data(f"{server.url}/train", cache=CacheOptions(name))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/cache: cannot be used as a cache"):
        open_data(f"{server.url}/train", cache=CacheOptions(f"{tmp_path}/file/cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_verify_reads_the_origin_rather_than_the_cache(server: FaultyServer, default: Path) -> None:
    open_data(f"{server.url}/val").index(0)
    assert default.exists(), "a good copy of the index is cached"
    assert not verify(f"{server.url}/val")
    server.spoil("403", times=100, match="shard-000000.index.npy")
    (fault,) = verify(f"{server.url}/val")
    assert fault.shard == "shard-000000.tar"
    assert "shard-000000.index.npy" in fault.reason


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_cache_size_that_is_not_a_positive_number_is_rejected(size: str) -> None:
    parser = argparse.ArgumentParser()
    cli.add_cache(parser)
    assert cli.cache_of(parser.parse_args(["--cache", "x", "--cache-gb", "1.5"])) == CacheOptions("x", 1.5)
    with pytest.raises(InputError, match=f"--cache-gb {size}: a positive number was expected"):
        cli.cache_of(parser.parse_args([f"--cache-gb={size}"]))


def test_shard_set_is_constructed_only_in_expected_modules() -> None:
    """`show` and `verify` read a few parts or everything once, and cache nothing."""
    calls = {}
    for path in sorted(file for room in ("pipeline", "launch") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ShardSet":
                calls[path.relative_to(ROOT / "pipeline/shards").as_posix()] = node.lineno
    assert list(calls) == ["open_data.py", "show_dataset.py", "verify.py"]
