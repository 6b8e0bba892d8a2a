"""Small real data sets, configurations, and a way to run code on several ranks."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipeline import log
from pipeline.config import Config, load_config
from tests.ranks import PATIENCE_S, ROOT, start

if TYPE_CHECKING:
    import torch


def pytest_configure(config: pytest.Config) -> None:
    """Everything computes on the CPU, unless it is asked for the tests that are meant for a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    # OpenMP's threads spin while they wait, which on a busy machine of two cores costs minutes. Tests without torch do
    # not import it for this: that takes seconds.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def device() -> "Iterator[torch.device | None]":
    """The device that tests compute on, where tensors are made unless a test says otherwise; None without torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield None
        return
    if not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as pipeline/network.py does
    torch.set_default_device("cuda")
    yield torch.device("cuda", 0)
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def plain_log() -> None:
    """What is logged in this process goes to standard error without the time, so that tests can compare it."""
    log.configure(logging.Formatter("%(message)s"))


# Shells start background jobs with SIGINT ignored, which their children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PVT_MODEL_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a row, to be copied: to create them takes longer than most tests."""
    from pipeline.track import tracking_server

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking_server.connect(f"sqlite:///{path}", create=True)
    return path


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as DIR/{train,val}/CLASS/*.jpg, written as the demo does."""
    folder = tmp_path_factory.mktemp("digits") / "images"
    subprocess.run([sys.executable, "launch/digits.py", "--out", folder], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def digits(digit_images: Path) -> Path:
    """The same, packed: DIR/train in 8 shards and DIR/val in 2."""
    from pipeline.shards.pack import pack

    folder = digit_images.parent
    manifest = pack(digit_images / "train", folder / "train", samples_per_shard=200)
    pack(digit_images / "val", folder / "val", classes=manifest.classes, samples_per_shard=200)
    return folder


@pytest.fixture
def make_config(digits: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a Config for a tiny run on the digits; arguments are `--set` overrides."""

    def make(*overrides: str) -> Config:
        return load_config(write_config(digits, tmp_path), list(overrides))

    return make


def write_config(digits: Path, folder: Path) -> Path:
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(folder / "runs")},
        "model": {"name": "pvt_pico", "drop_path_rate": 0.1},
        "image": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        "data": {"train": str(digits / "train"), "val": str(digits / "val"), "lanes": 12, "shuffle_window": 64},
        "augment": {"crop_scale": [0.6, 1.0], "hflip": 0.5},
        "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
        "optim": {"lr": 1e-3, "warmup": "4 steps", "clip_grad": 1.0},
        "train": {"length": "20 steps", "global_batch_size": 48, "log_every": "1 step", "deterministic": True},
        "engine": {"precision": "fp32"},  # CPUs without AVX-512 take ten times as long for bf16
        "tracking": {"system_metrics": False, "report": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_ranks(ranks: int, script: str, *arguments: object, timeout_s: float = PATIENCE_S) -> list[dict[str, Any]]:
    """Run tests/workers/SCRIPT.py on `ranks` local ranks and return the JSON objects that rank 0 printed."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = start(ranks, f"tests.workers.{script}", arguments, logs)
        try:
            deadline = time.monotonic() + timeout_s
            while any(process.poll() is None for process in processes):
                ended_badly = any(process.poll() for process in processes)
                if ended_badly or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            for rank, process in enumerate(processes):
                error = logs[rank].with_suffix(".err").read_text() if process.poll() else ""
                assert not process.poll(), f"rank {rank} ended with {process.returncode}:\n{error[-4000:]}"
            assert all(process.returncode == 0 for process in processes), f"not done after {timeout_s} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = logs[0].with_suffix(".out").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
