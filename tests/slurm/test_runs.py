"""Runs on three nodes: what SLURM, people and accidents do to them changes nothing in the weights."""

import functools
import hashlib
import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.chaos.runs import Job
from tests.ranks import PATIENCE_S
from tests.slurm.cluster import Cluster, Submitted, until
from tests.slurm.conftest import STEPS


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    """The same on one node of two ranks, without SLURM."""
    job = Job(config, "undisturbed", ranks=2)
    job.finish()
    return job.folder


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / f"checkpoints/step-{STEPS:08d}/model.safetensors").read_bytes()).hexdigest()


def trace(folder: Path) -> list[str]:
    """What each step consumed, once each and in order."""
    lines: list[str] = []
    for rank in (0, 1):
        lines += (folder / f"trace/rank-{rank}.jsonl").read_text().splitlines()
    return lines


def check_nothing_changed(run: Submitted, undisturbed: Path) -> None:
    assert run.wait() == "COMPLETED", run.log[-3000:]
    assert weights(run.folder) == weights(undisturbed)
    assert trace(run.folder) == trace(undisturbed)
    assert run.events()[-1]["event"] == "finished"
    assert json.loads((run.folder / "result.json").read_text())["model"].endswith("/1")


def test_two_node_run_matches_single_node_run(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = cluster.submit(config, "--set", "run.name=two-nodes")
    check_nothing_changed(run, undisturbed)
    assert "all-reduce over 2 ranks" in run.log
    (start,) = run.events("start")
    assert (start["nodes"], start["ranks"], start["step"]) == (["n1", "n2"], 2, 0)
    subprocess.run(["shellcheck", run.folder / "slurm/job.sbatch"], check=True)


def test_time_limit_saves_and_requeues(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = cluster.submit(config, "--set", "run.name=limit", "--set", "cluster.grace_s=120")
    run.wait_for_step(30)
    for rank in run.ranks():  # or they would be done before the limit is near
        rank.suspend()
    # Two minutes before its limit SLURM sends SIGUSR1. It looks every half a minute whether that is now.
    cluster.ask("scontrol", "update", f"JobId={run.job}", f"TimeLimit={2 + int(run.seconds() // 60)}")
    until(lambda: "stopping: signal SIGUSR1" in run.log, PATIENCE_S)
    for rank in run.ranks():
        rank.resume()
    until(lambda: run.state() == "PENDING", PATIENCE_S)
    cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    check_a_stretch_more(run, undisturbed)


def test_requeueing_without_progress_gives_up(cluster: Cluster, config: Path) -> None:
    """The signal of the time limit comes as soon as srun has been started, each time: before there are ranks."""
    run = cluster.submit(config, "--set", "run.name=in-vain")

    def has_started(times: int) -> bool:
        run.hurry()
        return len(run.events("start")) == times

    for times in (1, 2):
        until(functools.partial(has_started, times), PATIENCE_S, lambda: run.log[-3000:])
        cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
    assert run.wait() == "FAILED", run.log[-3000:]
    assert [event["restarts"] for event in run.events("no progress")] == [1, 2]
    (end,) = run.events("gave up")
    assert "2 failures without a checkpoint after step 0" in end["why"]
    assert not run.events("crash")


def test_preemption_saves_and_requeues(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    """SLURM sends SIGTERM to the ranks before it takes the nodes for another job."""
    run = cluster.submit(config, "--set", "run.name=preempted")
    run.wait_for_step(30)
    cluster.ask("scancel", "--signal=TERM", run.job)
    check_a_stretch_more(run, undisturbed)


def check_a_stretch_more(run: Submitted, undisturbed: Path) -> None:
    until(lambda: bool(run.events("requeue")), PATIENCE_S)
    check_nothing_changed(run, undisturbed)
    first, second = run.events("start")
    assert second["step"] == run.events("stopped")[0]["step"] >= 30
    assert not run.events("crash")
    assert first["job"] == second["job"]
    runs = json.loads((run.folder / "goodput.json").read_text())
    assert runs["restarts"] == 1


def test_run_restarts_after_rank_is_killed(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = cluster.submit(config, "--set", "run.name=killed")
    run.wait_for_step(30)
    run.kill_a_rank()
    check_nothing_changed(run, undisturbed)
    (crash,) = run.events("crash")
    assert crash["restarts"] == 1
    assert [event["job"] for event in run.events("start")] == [run.job] * 2


def test_run_restarts_after_slurmstepd_is_killed(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    """SLURM does not notice it, and waits for the rank's end."""
    run = cluster.submit(config, "--set", "run.name=stepd")
    run.wait_for_step(30)
    run.kill_a_rank_and_its_slurmstepd()
    check_nothing_changed(run, undisturbed)
    assert len(run.events("crash")) == 1
    assert "srun has not ended" in run.log


def test_spare_replaces_lost_node(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = cluster.submit(config, "--set", "run.name=lost", "--set", "cluster.spares=1")
    run.wait_for_step(30)
    with cluster.lost("n2"):
        check_nothing_changed(run, undisturbed)
    assert len(run.events("crash")) == 1
    assert [event["nodes"] for event in run.events("start")] == [["n1", "n2"], ["n1", "n3"]]


def test_crash_loop_gives_up(cluster: Cluster, config: Path) -> None:
    """A rank dies at the same place again and again."""
    run = cluster.submit(config, "--set", "run.name=loop", "--set", "train.save_every=100 steps")
    for _ in range(2):
        run.wait_for_step(5)
        run.kill_a_rank()
        time.sleep(2)
    assert run.wait() == "FAILED"
    assert [event["restarts"] for event in run.events("crash")] == [1, 2]
    (end,) = run.events("gave up")
    assert "2 failures without a checkpoint after step 0" in end["why"]


def test_spare_replaces_node_that_fails_preflight(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "n1").write_text("where the scratch folder should be")
    scratch = f"{tmp_path}/$SLURMD_NODENAME"
    overrides = ["run.name=spare", "cluster.spares=1", f"cluster.scratch={scratch}"]
    run = cluster.submit(config, *(word for each in overrides for word in ("--set", each)))
    check_nothing_changed(run, undisturbed)
    (excluded,) = run.events("excluded")
    assert excluded["node"] == "n1"
    assert "n1" in excluded["why"]
    assert run.events("start")[0]["nodes"] == ["n2", "n3"]


def test_run_on_fewer_nodes_sees_same_batches(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = cluster.submit(config, "--set", "run.name=shrunk", "--set", "cluster.min_nodes=1")
    run.wait_for_step(30)
    cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
    until(lambda: bool(run.events("requeue")), PATIENCE_S)
    others = "n2,n3"
    cluster.ask("scontrol", "update", f"NodeName={others}", "State=drain", "Reason=test")
    try:
        run.wait_for_step(60)
        cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
        until(lambda: len(run.events("requeue")) == 2, PATIENCE_S)
    finally:
        cluster.ask("scontrol", "update", f"NodeName={others}", "State=resume")
    assert run.wait() == "COMPLETED"
    assert [len(event["nodes"]) for event in run.events("start")] == [2, 1, 2]
    assert samples(run.folder) == samples(undisturbed)


def samples(folder: Path) -> dict[int, list[tuple[object, ...]]]:
    """What each step's global batch was made of, whichever rank had it."""
    steps: dict[int, list[tuple[object, ...]]] = {}
    for line in trace(folder):
        entry = json.loads(line)
        for sample in entry["samples"]:
            if sample["weight"]:
                seen = tuple(sample[name] for name in ("position", "key", "weight", "pixels", "label"))
                steps.setdefault(entry["step"], []).append(seen)
    return {step: sorted(seen, key=str) for step, seen in steps.items()}
