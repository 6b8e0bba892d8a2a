"""What is told of runs on SLURM: on files as the project writes them, whole and cut short, and on answers of squeue."""

import json
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cluster import run_log
from pipeline.cluster import status as module
from pipeline.cluster.journal import EVENTS, Journal
from pipeline.cluster.run_log import follow, tail
from pipeline.cluster.status import SlurmJob, Status, read_status
from pipeline.cluster.supervise import LOG
from pipeline.commands.status_text import format_status
from pipeline.config import Config, SourceConfig, dump_config
from pipeline.errors import InputError
from pipeline.feed.order import Order
from pipeline.track.sync.record import DataInput, Record
from pipeline.train.checkpoint_files import Commit, FileEntry
from pipeline.train.goodput import Goodput
from pipeline.train.meters import MetricsFile
from pipeline.train.schedule import Schedule
from tests.ranks import ROOT

SAMPLES = 1013


class Slurm:
    """A `squeue` that answers what it has been told, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        script = folder / "squeue"
        script.write_text(
            '#!/bin/sh\ncd "$(dirname "$0")"\necho "$@" >> asked\ncat error >&2 2> /dev/null && exit 1\ncat answer\n'
        )
        script.chmod(0o755)
        self.answers()

    def answers(self, *lines: str) -> None:
        (self._folder / "answer").write_text("".join(f"{line}\n" for line in lines))
        (self._folder / "error").unlink(missing_ok=True)

    def fails(self, message: str) -> None:
        (self._folder / "error").write_text(f"{message}\n")

    def asked(self) -> list[str]:
        path = self._folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Slurm(tmp_path / "bin")


class Run:
    """A run's folder, written by those who write it in earnest."""

    def __init__(self, root: Path, name: str = "big", *, length: str = "30 epochs") -> None:
        self.folder = root / name
        (self.folder / "slurm").mkdir(parents=True)
        self.config = Config.model_validate(
            {
                "run": {"name": name, "root": str(root)},
                "model": {"name": "pvt_pico"},
                "data": {"train": "data", "lanes": 12},
                "optim": {"lr": 1e-3, "warmup": "1 step"},
                "train": {"length": length, "global_batch_size": 96},
            }
        )
        self.journal = Journal(self.folder, "17")
        self.write("slurm/config.yaml", dump_config(self.config))

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def submitted(self, **others: Any) -> None:
        self.write("slurm/jobs.json", json.dumps({"job": "17", "handoffs": {}, "sweep": [], **others}))

    def begins(self, *, samples: tuple[int, ...] = (SAMPLES,)) -> None:
        self.write("config.yaml", dump_config(self.config))
        inputs = [
            DataInput(
                context="training",
                path="data",
                digest="0" * 64,
                samples=each,
                classes=7,
                manifest=f"data/training-{n}.json",
            )
            for n, each in enumerate(samples)
        ]
        validation = DataInput(
            context="validation", path="val", digest="0" * 64, samples=50, classes=7, manifest="data/validation-1.json"
        )
        Record.begin(self.folder, self.config.run.name, tags={}, inputs=[*inputs, validation])
        self.goodput = Goodput(self.folder / "goodput.json", resumed_step=0, process_start=time.time())
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", 0)

    def steps(self, step: int, *, loss: float = 1.5, images_per_second: float = 640.0) -> None:
        reading = {"epoch": step / 10, "lr": 1e-3, "loss": loss, "images_per_second": images_per_second, "step_s": 0.15}
        self.metrics.on_step(step, {**reading, "ettr": 0.9})
        self.goodput.save(step)

    def saves(self, step: int, *, committed: bool = True) -> None:
        folder = self.folder / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"1")
        if committed:
            commit = Commit(format=2, files={"model.safetensors": FileEntry(bytes=1, sha256="0" * 64)})
            (folder / "COMMIT.json").write_text(commit.model_dump_json())

    def ends(self, **result: Any) -> None:
        self.write("result.json", json.dumps({"run": str(self.folder), **result}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs")


def test_status_of_a_running_job(run: Run, squeue: Slurm):
    run.submitted()
    run.journal.write("excluded", node="n3", why="disk: /scratch has 0.1 GB free")
    run.journal.write("start", attempt=1, nodes=["n1", "n2"], ranks=4, step=0)
    run.begins()
    run.saves(0)
    run.steps(10)
    run.metrics.on_evaluation(10, {"top1": 0.625, "val_loss": float("nan")})
    run.saves(20)
    run.saves(30, committed=False)
    run.steps(25, loss=1.25)
    squeue.answers("17|RUNNING|n[1-2]|1-02:03:04|2026-11-23T10:00:00|None")

    known = read_status(run.folder)

    assert known.phase == "running"
    assert known.job == SlurmJob("17", "RUNNING", nodes="n[1-2]", left_s=93784)
    assert (known.step, known.total_steps, known.epoch) == (25, 300, 2.5)
    assert (known.images_per_second, known.loss, known.ettr) == (640.0, 1.25, 0.9)
    assert known.scores == {"top1": 0.625, "val_loss": None}
    assert known.scored_step == 10
    assert known.checkpoint_step == 20
    assert known.checkpoint_age_s is not None
    assert 0 <= known.checkpoint_age_s < 60
    assert (known.restarts, known.restarts_without_progress, known.last_error) == (0, 0, None)
    assert known.excluded == {"n3": "disk: /scratch has 0.1 GB free"}
    assert known.faults == ()
    assert json.loads(json.dumps(known.document(), allow_nan=False))["job"]["state"] == "RUNNING"
    page = format_status(known)
    for part in (
        "running",
        "step 25 of 300",
        "8.3 %",
        "n[1-2]",
        "1 d 2 h",
        "top1 62.5 %",
        "val_loss not finite",
        "n3: disk",
    ):
        assert part in page


def test_squeue_is_called_once_for_all_jobs(run: Run, squeue: Slurm):
    run.submitted(handoffs={"runs/a": "18", "runs/b": "19"})
    read_status(run.folder)
    assert len(squeue.asked()) == 1
    # A line for each task of an array, and jobs that have ended as well.
    assert {"--jobs=17,18,19", "--array", "--states=all"} <= set(squeue.asked()[0].split())


@pytest.mark.parametrize("length", ["30 epochs", "300 steps", "28800 images"])
@pytest.mark.parametrize("samples", [(SAMPLES,), (600, 700)])
def test_total_steps_match_the_training_schedule(tmp_path: Path, length: str, samples: tuple[int, ...], squeue: Slurm):
    run = Run(tmp_path / "runs", length=length)
    run.begins(samples=samples)
    sources = [{"path": f"data{number}"} for number in range(len(samples))]
    data = run.config.data.model_copy(update={"train": tuple(SourceConfig.model_validate(each) for each in sources)})
    order = Order.of(run.config.model_copy(update={"data": data}), [np.array([each]) for each in samples])
    assert read_status(run.folder).total_steps == Schedule.of(run.config, order.steps_per_epoch).total


def test_time_left_uses_the_current_attempt_only(run: Run, squeue: Slurm):
    run.submitted()
    run.begins()
    run.journal.write("start", attempt=2, nodes=["n1"], ranks=2, step=90)
    began = json.loads((run.folder / EVENTS).read_text())["time"]
    # 1 s a step before, an hour in which nothing ran, and then 2 s a step.
    times = {80: began - 3610, 90: began - 3600, 100: began + 30, 110: began + 50, 120: began + 70}
    reading = {"loss": 1.5, "images_per_second": 96.0, "step_s": 1.0}
    lines = [{"step": step, "time": at, **reading} for step, at in times.items()]
    run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_status(run.folder).left_s == pytest.approx((300 - 120) * 2.0)

    run.write("metrics.jsonl", json.dumps({**lines[0], "time": began + 1, "step_s": 0.5}) + "\n")
    assert read_status(run.folder).left_s == pytest.approx((300 - 80) * 0.5), "a single reading"


def test_status_of_a_job_that_never_started(run: Run, squeue: Slurm):
    run.submitted()
    moment = datetime(2026, 11, 23, 12, 0, 0)
    squeue.answers(f"17|PENDING||INVALID|{moment.isoformat()}|Resources")
    known = read_status(run.folder)
    assert known.phase == "not started"
    assert known.job == SlurmJob("17", "PENDING", "Resources", start=moment.timestamp())
    assert str(known.job) == "PENDING (Resources)"
    assert (known.step, known.total_steps, known.left_s, known.restarts) == (None, None, None, None)
    assert "PENDING (Resources)" in format_status(known)

    squeue.answers("17|PENDING||INVALID|N/A|Priority")
    assert read_status(run.folder).job == SlurmJob("17", "PENDING", "Priority")

    squeue.answers("17|COMPLETED|n1|0:00|2026-11-23T10:00:00|None")
    assert read_status(run.folder).phase == "not started", "a hand-off whose gate was not passed"
    run.journal.write("excluded", node="n1", why="clock")
    assert read_status(run.folder).phase == "lost"


def test_total_steps_in_steps_are_known_before_the_run_starts(tmp_path: Path, squeue: Slurm):
    assert read_status(Run(tmp_path, length="500 steps").folder).total_steps == 500


def test_status_of_a_finished_run(run: Run, squeue: Slurm):
    run.submitted()
    run.begins()
    run.steps(300)
    run.ends(steps=300, ettr=0.95, top1=0.99)
    run.journal.write("finished")
    squeue.fails("slurm_load_jobs error: Invalid job id specified")
    known = read_status(run.folder)
    assert (known.phase, known.job, known.left_s, known.ettr) == (
        "finished",
        SlurmJob("17", "not in the queue"),
        0.0,
        0.95,
    )
    assert "100.0 %" in format_status(known)


def test_status_of_a_stopped_run_by_queue_state(run: Run, squeue: Slurm):
    run.submitted()
    run.begins()
    run.steps(50)
    run.ends(requeue=True)
    run.journal.write("stopped", step=50)
    assert read_status(run.folder).phase == "stopped"
    squeue.answers("17|PENDING||INVALID|N/A|BeginTime")
    assert read_status(run.folder).phase == "waiting"
    squeue.answers("17|RUNNING|n1|59:30|2026-11-23T10:00:00|None")
    known = read_status(run.folder)
    assert known.phase == "running"
    assert known.job is not None
    assert known.job.left_s == 59 * 60 + 30


def test_status_of_a_crash_loop(run: Run, squeue: Slurm):
    run.submitted()
    run.begins()
    run.steps(20)
    run.saves(20)
    for restarts in (1, 2):
        run.journal.write("start", attempt=restarts, nodes=["n1"], ranks=2, step=20)
        run.journal.write("crash", code=1, step=20, restarts=restarts, error=f"Boom\n  number {restarts}")
    run.journal.write("start", attempt=3, nodes=["n1"], ranks=2, step=20)
    squeue.answers("17|RUNNING|n1|UNLIMITED|2026-11-23T10:00:00|None")
    known = read_status(run.folder)
    assert (known.restarts, known.restarts_without_progress) == (2, 2)
    assert known.last_error is not None
    assert (known.last_error.event, known.last_error.message) == ("crash", "Boom\n  number 2")
    assert known.job == SlurmJob("17", "RUNNING", nodes="n1")
    assert "Boom number 2" in format_status(known)
    assert "2, 2 since the newest checkpoint" in format_status(known)

    run.journal.write("gave up", why="3 failures without a checkpoint after step 20, the last one: Boom")
    squeue.answers()
    known = read_status(run.folder)
    assert known.phase == "failed"
    assert known.last_error is not None
    assert known.last_error.event == "gave up"

    run.saves(30)
    assert read_status(run.folder).restarts_without_progress == 0


def test_status_ignores_events_of_an_earlier_job(run: Run, squeue: Slurm):
    run.submitted()
    Journal(run.folder, "16").write("excluded", node="n9", why="clock")
    Journal(run.folder, "16").write("gave up", why="configuration")
    run.journal.write("excluded", node="n2", why="no answer")
    run.journal.write("start", attempt=1, nodes=["n1"], ranks=1, step=0)
    squeue.answers("17|RUNNING|n[1-2]|10:00|2026-11-23T10:00:00|None")
    known = read_status(run.folder)
    assert (known.phase, known.excluded) == ("running", {"n2": "no answer"})
    run.journal.write("start", attempt=2, nodes=["n1", "n2"], ranks=2, step=0)
    assert read_status(run.folder).excluded == {}, "well again"


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "CANCELLED"])
def test_status_of_a_job_that_ended_without_an_event_is_lost(run: Run, squeue: Slurm, state: str):
    run.submitted()
    run.journal.write("start", attempt=1, nodes=["n1"], ranks=1, step=0)
    run.begins()
    run.steps(10)
    squeue.answers(f"17|{state}|n1|0:00|2026-11-23T10:00:00|NonZeroExitCode")
    known = read_status(run.folder)
    assert (known.phase, str(known.job)) == ("lost", f"{state} (NonZeroExitCode)")
    squeue.answers()
    known = read_status(run.folder)
    assert (known.phase, str(known.job)) == ("lost", "not in the queue")


def test_unreachable_slurm_is_reported_in_the_status(run: Run, squeue: Slurm, monkeypatch: pytest.MonkeyPatch):
    run.submitted()
    run.begins()
    run.steps(10)
    squeue.fails("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    known = read_status(run.folder)
    assert (known.phase, known.step) == ("unknown", 10)
    assert known.job is not None
    assert known.job.state == "unknown"
    assert "connect failure" in format_status(known)

    monkeypatch.setenv("PATH", "/nowhere")
    assert "no SLURM" in format_status(read_status(run.folder))


def test_half_written_last_line_is_not_a_fault(run: Run, squeue: Slurm):
    run.submitted()
    run.journal.write("start", attempt=1, nodes=["n1"], ranks=1, step=0)
    run.begins()
    run.steps(10)
    whole = read_status(run.folder)
    for name in (EVENTS, "metrics.jsonl"):
        path = run.folder / name
        last = path.read_text().splitlines()[-1]
        for length in range(0, len(last) + 1, 9):
            path.write_text(f"{last}\n{last[:length]}")
            known = read_status(run.folder)
            assert known.faults == ()
            assert (known.step, known.phase) == (whole.step, whole.phase)


def test_invalid_metric_values_are_omitted(run: Run, squeue: Slurm):
    run.submitted()
    run.write("metrics.jsonl", '{"step": 1, "time": 1, "images_per_second": "many", "loss": NaN, "epoch": true}\n')
    known = read_status(run.folder)
    assert (known.step, known.images_per_second, known.loss, known.epoch) == (1, None, None, None)


def test_unreadable_run_files_are_reported(run: Run, squeue: Slurm):
    run.submitted()
    run.begins()
    run.steps(10)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "ti\n[3]\n{"step": "x", "images_per_second": 1}\n')
    run.write("goodput.json", '{"step"')
    run.write("run.json", "[]")
    known = read_status(run.folder)
    assert known.step == 10
    assert [Path(fault.partition(":")[0]).name for fault in known.faults] == [
        "metrics.jsonl",
        "goodput.json",
        "run.json",
    ]
    assert "2 lines cannot be read, the first is line 2" in known.faults[0]
    assert all(fault in format_status(known) for fault in known.faults)


@pytest.mark.parametrize(
    "missing", ["run.json", "config.yaml", "metrics.jsonl", "goodput.json", EVENTS, "slurm/jobs.json"]
)
def test_status_tolerates_each_missing_file(run: Run, squeue: Slurm, missing: str):
    run.submitted()
    run.begins()
    run.steps(10)
    run.journal.write("start", attempt=1, nodes=["n1"], ranks=1, step=0)
    (run.folder / missing).unlink()
    known = read_status(run.folder)
    assert (known.step, known.faults) == (10, ())
    assert format_status(known)


def test_folder_without_a_run_is_rejected(tmp_path: Path, squeue: Slurm):
    with pytest.raises(InputError, match="no such folder"):
        read_status(tmp_path / "runs" / "typo")
    with pytest.raises(InputError, match=r"neither slurm/ nor run\.json"):
        read_status(tmp_path)


def test_status_of_handoffs(tmp_path: Path, run: Run, squeue: Slurm):
    child = Run(tmp_path / "runs", "big-pets", length="50 steps")
    child.begins()
    child.steps(10)
    run.submitted(handoffs={str(child.folder): "18", "runs/big-scenes": "19"})
    squeue.answers("18|RUNNING|n1|10:00|2026-11-23T10:00:00|None", "19|PENDING||INVALID|N/A|Dependency")
    known = read_status(run.folder)
    pets, scenes = known.handoffs
    assert (pets.run, pets.phase, pets.step, pets.total_steps) == (str(child.folder), "running", 10, 50)
    assert (scenes.run, scenes.phase, str(scenes.job)) == (
        str(run.folder.parent / "big-scenes"),
        "not started",
        "PENDING (Dependency)",
    )
    lines = format_status(known).splitlines()
    assert any("big-pets" in line and "step 10 of 50" in line for line in lines)
    assert any("big-scenes" in line and "19 PENDING (Dependency)" in line for line in lines)


def test_status_of_a_sweep(tmp_path: Path, run: Run, squeue: Slurm):
    members = [Run(tmp_path / "runs", f"big-{number}", length="50 steps") for number in range(3)]
    members[0].begins()
    members[0].steps(50)
    members[0].ends(top1=0.5)
    members[1].begins()
    members[1].steps(20, loss=0.75)
    run.submitted(sweep=[str(member.folder) for member in members])
    squeue.answers("17_1|RUNNING|n1|10:00|2026-11-23T10:00:00|None", "17_2|PENDING||INVALID|N/A|Resources")
    known = read_status(run.folder)
    assert "--jobs=17_0,17_1,17_2" in squeue.asked()[0]
    assert [child.phase for child in known.children] == ["finished", "running", "not started"]
    assert known.phase == "running"
    lines = [line for line in format_status(known).splitlines() if "big-" in line]
    assert len(lines) == 3
    assert "loss 0.75" in lines[1]
    members[1].ends(top1=0.5)
    members[2].ends(top1=0.5)
    assert read_status(run.folder).phase == "finished"


def test_every_phase_can_be_formatted(run: Run):
    for phase in module.Phase.__args__:
        assert phase in format_status(Status(str(run.folder), phase))


def test_status_does_not_import_heavy_packages():
    code = "import sys, pipeline.cluster.status; print(*{'torch', 'mlflow', 'numpy', 'deepspeed'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture
def log(run: Run) -> Path:
    path = run.folder / LOG
    lines = ["[10:00] start"]
    for number in range(100):
        lines += [f" 3: step {number}", f"13: step {number}", f"srun: error {number}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tail_returns_last_lines_of_a_rank(log: Path):
    whole = log.read_text().splitlines()
    for lines in (1, 2, 100, len(whole), 10_000):
        assert tail(log, lines) == whole[-lines:]
    assert tail(log, 0) == []
    assert tail(log, 2, rank=3) == [" 3: step 98", " 3: step 99"]
    assert tail(log, 1, rank=13) == ["13: step 99"]
    assert tail(log, 5, rank=1) == []
    with log.open("ab") as file:
        file.write(b"\xff half")
    assert tail(log, 1) == ["\N{REPLACEMENT CHARACTER} half"]
    with pytest.raises(InputError, match="no such log"):
        tail(log.with_name("none"), 1)


def test_follow_yields_whole_lines_and_the_rest_at_the_end(log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_log, "_POLL_S", 0.01)
    ended = threading.Event()
    lines = follow(log, ended.is_set, lines=1)
    assert next(lines) == "srun: error 99"
    with _written_later(log, "new ", "line\nhalf"):
        assert next(lines) == "new line"
    ended.set()
    assert list(lines) == ["half"]


def test_follow_waits_for_a_missing_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_log, "_POLL_S", 0.01)
    ended = threading.Event()
    with _written_later(tmp_path / "log", "0: first\n", "1: second\n"):
        lines = follow(tmp_path / "log", ended.is_set, rank=1)
        assert next(lines) == "1: second"
    ended.set()
    assert list(lines) == []
    assert list(follow(tmp_path / "none", lambda: True)) == []


class _written_later:
    """Appends each text a moment after the one before, in another thread."""

    def __init__(self, path: Path, *texts: str) -> None:
        self._thread = threading.Thread(target=self._write, args=(path, texts))

    @staticmethod
    def _write(path: Path, texts: tuple[str, ...]) -> None:
        for text in texts:
            time.sleep(0.05)
            with path.open("a") as file:
                file.write(text)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
