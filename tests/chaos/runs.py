"""Whole runs of launch/pretrain.py or finetune.py, driven from outside: started rank by rank, watched through their
files, killed.

write_config ──▶ Job ──start──▶ Attempt, a process a rank ──▶ metrics.jsonl  checkpoints/  trace/ ──▶ differences
                                   ▲ step, saving()               │
                                   └──────────────────────────────┘
"""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import yaml

from pipeline.shards.pack import pack
from tests import conftest
from tests.ranks import PATIENCE_S, ROOT, Rank, start

COMMIT = "COMMIT.json"

# What a metrics line holds that has to repeat. The others are times and speeds.
STEP_NUMBERS = ("step", "epoch", "loss", "lr", "grad_norm")
SCORES = ("step", "top1", "top5", "val_loss")


def pack_digits(folder: Path) -> Path:
    """scikit-learn's digits as FOLDER/train and FOLDER/val."""
    images = folder / "images"
    subprocess.run([sys.executable, ROOT / "launch/digits.py", "--out", images], check=True, capture_output=True)
    manifest = pack(images / "train", folder / "train", samples_per_shard=200)
    pack(images / "val", folder / "val", classes=manifest.classes, samples_per_shard=200)
    return folder


def write_config(
    digits: Path, folder: Path, *, ranks: int, stage: int, steps: int, save_every: int = 7, precision: str = "fp32"
) -> Path:
    """A tiny run with everything on that could go wrong when it is repeated: dropout, drop-path, mixing, RandAugment,
    accumulation, an average of the weights, several epochs, evaluation in between."""
    path = conftest.write_config(digits, folder)
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    micro = -(-tree["train"]["global_batch_size"] // ranks // 2)
    tree["model"] |= {"drop_rate": 0.1, "drop_path_rate": 0.1}
    tree["augment"] |= {"rand_augment": "rand-m9-mstd0.5-inc1"}
    tree["train"] |= {
        "length": f"{steps} steps",
        "micro_batch_size": micro + micro % 2,  # mixing pairs samples
        "save_every": f"{save_every} steps",
        "eval_every": "20 steps",
        "ema_decay": 0.99,
    }
    tree["checkpoint"] = {"keep_last": 3}
    tree["engine"] = {"precision": precision, "zero_stage": stage}
    tree["debug"] = {"trace_samples": True}
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclasses.dataclass(frozen=True)
class Job:
    """A run by its configuration. Started again, it is the same command, which is how a batch system does it."""

    config: Path
    name: str
    ranks: int
    overrides: tuple[str, ...] = ()
    target: str = "launch/pretrain.py"
    first: tuple[str, ...] = ()
    """Arguments that the target takes before the others."""

    @property
    def folder(self) -> Path:
        return Path(yaml.safe_load(self.config.read_text())["run"]["root"]) / self.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def newest_step(self) -> int:
        """Of the committed checkpoints; 0 without any."""
        return max((step_of(commit.parent) for commit in self.checkpoints.glob(f"step-*/{COMMIT}")), default=0)

    def start(self) -> "Attempt":
        return Attempt(self)

    def finish(self, timeout_s: float = PATIENCE_S) -> "Attempt":
        """Run to the end. Raises RuntimeError if a rank does not end with 0."""
        with self.start() as attempt:
            attempt.wait(timeout_s)
            attempt.expect_success()
        return attempt


class Attempt:
    """The processes of one start of a job. Leaving it as a context manager ends those that are left."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._metrics = job.folder / "metrics.jsonl"
        # What lies there now is an earlier attempt's, until it changes.
        self._old_metrics = _identity(self._metrics)
        self._old_saves = {folder: _identity(folder) for folder in job.checkpoints.glob("step-*")}
        logs = job.folder.parent / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob(f"{job.name}-*-rank-0.err")))
        self._logs = [logs / f"{job.name}-{number:03d}-rank-{rank}" for rank in range(job.ranks)]
        config = [f"run.name={job.name}", *job.overrides]
        arguments = [*job.first, "--config", job.config, *(part for setting in config for part in ("--set", setting))]
        self.processes: list[Rank] = start(job.ranks, job.target, arguments, self._logs)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill(range(self.job.ranks))
        for process in self.processes:
            process.wait()

    def kill(self, ranks: Iterable[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(number)

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    @property
    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def wait(self, timeout_s: float) -> bool:
        """Whether all ranks ended by themselves in time."""
        return self.wait_until(lambda: not self.running, timeout_s)

    def wait_until(self, happened: Callable[[], object], timeout_s: float, poll_s: float = 0.01) -> bool:
        """Whether it happened before the time was over or all ranks had ended."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            if time.monotonic() > deadline or not self.running:
                return bool(happened())
            time.sleep(poll_s)
        return True

    def expect_success(self) -> None:
        if any(self.codes) or self.running:
            self._fail("0")

    def expect_killed(self, ranks: Iterable[int]) -> None:
        """That these were, rather than having ended before by some other trouble."""
        if any(self.codes[rank] not in (0, -signal.SIGKILL) for rank in ranks):
            self._fail(f"{-signal.SIGKILL} for {list(ranks)}")

    def _fail(self, expected: str) -> NoReturn:
        tails = "\n".join(f"rank {rank}:\n{self.errors(rank)[-3000:]}" for rank in range(self.job.ranks))
        raise RuntimeError(f"{self.job.folder}: ranks ended with {self.codes}, not with {expected}\n{tails}")

    def errors(self, rank: int = 0) -> str:
        return self._logs[rank].with_suffix(".err").read_text()

    def result(self) -> dict[str, Any]:
        return json.loads(self._logs[0].with_suffix(".out").read_text().splitlines()[-1])

    @property
    def step(self) -> int:
        """The newest step that this attempt or the one it continues has logged; 0 until it has begun."""
        if _identity(self._metrics) == self._old_metrics:
            return 0
        try:
            lines = self._metrics.read_bytes().split(b"\n")
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines[-2:-1]), default=0)  # behind the last is an empty one

    @property
    def resumed_at(self) -> int | None:
        """The step that rank 0 said it goes on from."""
        found = re.search(r"steps (\d+) to \d+", self.errors())
        return int(found[1]) if found else None

    def saving(self) -> Path | None:
        """The checkpoint that is being written at this instant."""
        try:
            with os.scandir(self.job.checkpoints) as entries:
                folders = [Path(entry.path) for entry in entries if entry.name.startswith("step-")]
        except FileNotFoundError:
            return None
        newest = max(folders, default=None)
        if newest is None or (newest / COMMIT).exists() or _identity(newest) == self._old_saves.get(newest):
            return None
        return newest


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _identity(path: Path) -> tuple[int, ...] | None:
    """Differs once the path is another file or folder, or has been written to."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


def checkpoint_differences(ours: Path, reference: Path) -> list[str]:
    """Between two checkpoints of the same step: all tensors to the last bit, and all that state.json counts."""
    differences = []
    tensors = {path.name for folder in (ours, reference) for path in folder.glob("*.safetensors")}
    for name in sorted(tensors):
        if _digest(ours / name) != _digest(reference / name):
            differences.append(f"{ours / name} differs")
    states = [json.loads((folder / "state.json").read_text())["state"] for folder in (ours, reference)]
    for name in sorted({name for state in states for name in state} - {"run_id"}):
        found, expected = (state.get(name) for state in states)
        if found != expected:
            differences.append(f"{ours / 'state.json'}: {name} is {found!r}, not {expected!r}")
    return differences


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def trace_differences(ours: Path, reference: Path) -> list[str]:
    names = {path.name for folder in (ours, reference) for path in folder.glob("rank-*.jsonl")}
    assert names, f"{reference} holds no trace"
    return [
        f"{ours / name} differs"
        for name in sorted(names)
        if not (ours / name).exists() or (ours / name).read_bytes() != (reference / name).read_bytes()
    ]


def metrics_differences(ours: Path, reference: Path, steps: int, scores: tuple[str, ...] = SCORES) -> list[str]:
    """Every step has to be there once, with the reference's numbers; and every evaluation."""
    lines, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (ours, reference))
    differences = []
    logged = [line["step"] for line in lines if "loss" in line]
    if logged != list(range(1, steps + 1)):
        differences.append(f"{ours}: the steps are {logged}")
    for kind, names in (("loss", STEP_NUMBERS), (scores[1], scores)):
        here, there = ([tuple(line[n] for n in names) for line in file if kind in line] for file in (lines, expected))
        assert there, f"{reference} holds no line with {kind}"
        if here != there:
            first = next((pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), "their number")
            differences.append(f"{ours}: lines with {kind} differ, first in {first}")
    return differences
