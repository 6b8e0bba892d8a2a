"""launch/submit.py on a cluster: what goes with a run, looking after it, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.shards.pack import pack
from tests.ranks import PATIENCE_S, ROOT
from tests.servers import FaultyServer
from tests.slurm.cluster import Cluster, Submitted, until
from tests.slurm.conftest import STEPS


@pytest.fixture
def own(config: Path, tmp_path: Path) -> Path:
    """The configuration with a root of runs for one test, whose name has a space in it."""
    tree = yaml.safe_load(config.read_text())
    tree["run"]["root"] = str(tmp_path / "my runs")
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_settings(*overrides: str) -> list[str]:
    return [word for each in overrides for word in ("--set", each)]


def status(cluster: Cluster, folder: Path) -> tuple[dict[str, Any], str]:
    """What is told to programs, and to people."""
    done = cluster.command("status", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def runs_of(folder: Path) -> list[Run]:
    """On the tracking server, whatever their experiment."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client.search_runs([each.experiment_id for each in client.search_experiments()])


# What goes with a run


def test_handoff_jobs_run_after_parent_job(cluster: Cluster, own: Path, tmp_path: Path) -> None:
    """Three jobs for SLURM, three registered models, and one whose gate nobody can pass."""
    tree = yaml.safe_load(own.read_text())
    child = {**tree, "run": {"name": "child"}, "cluster": {**tree["cluster"], "nodes": 1}}
    child["train"] = {**tree["train"], "length": "20 steps"}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    handoff: list[dict[str, Any]] = [
        {"set": ["run.name=classes"]},
        {"set": ["run.name=slowly", "optim.lr=1e-4"], "gate": {"top1": {"min": 0.01}}},
        {"set": ["run.name=never"], "gate": {"top1": {"min": 1.01}}},
    ]
    tree["handoff"] = [{"config": str(tmp_path / "child.yaml"), **entry} for entry in handoff]
    own.write_text(yaml.safe_dump(tree))

    run = cluster.submit(own)
    known, _ = status(cluster, run.folder)
    assert [each["phase"] for each in known["handoffs"]] == ["not started"] * 3
    assert {each["job"]["reason"] for each in known["handoffs"]} == {"Dependency"}
    assert run.wait() == "COMPLETED", run.log[-3000:]
    children = [Submitted(cluster, Path(folder), {"job": job}) for folder, job in run.result["handoffs"].items()]
    assert [each.wait() for each in children] == ["COMPLETED"] * 3

    models = {each.folder.name: json.loads((each.folder / "result.json").read_text())["model"] for each in children[:2]}
    assert models == {"classes": "models:/classes/1", "slowly": "models:/slowly/1"}
    assert not (children[2].folder / "result.json").exists()
    assert "not started: " in children[2].log
    known, told = status(cluster, run.folder)
    assert [each["phase"] for each in known["handoffs"]] == ["finished", "finished", "not started"]
    assert "hands off to" in told
    registered = MlflowClient(f"sqlite:///{tmp_path}/my runs/mlflow.db").search_registered_models()
    assert {model.name for model in registered} == {"tiny", "classes", "slowly"}


def test_sweep_runs_share_one_parent_run(cluster: Cluster, own: Path, tmp_path: Path) -> None:
    run = cluster.submit(own, "--sweep", "optim.lr=1e-3,5e-4", *with_settings("cluster.nodes=1"))
    folders = [Path(folder) for folder in run.result["sweep"]]
    assert [folder.name for folder in folders] == ["tiny-0", "tiny-1"]
    members = [Submitted(cluster, folder, {"job": f"{run.job}_{n}"}) for n, folder in enumerate(folders)]
    assert [member.wait() for member in members] == ["COMPLETED"] * 2, members[0].log[-3000:]
    known, told = status(cluster, run.folder)
    assert known["phase"] == "finished"
    assert [child["step"] for child in known["children"]] == [STEPS] * 2
    assert "tiny-0" in told
    parent, *others = sorted(runs_of(tmp_path / "my runs"), key=lambda each: MLFLOW_PARENT_RUN_ID in each.data.tags)
    assert {each.data.tags[MLFLOW_PARENT_RUN_ID] for each in others} == {parent.info.run_id}
    assert sorted(each.data.params["optim.lr"] for each in others) == ["0.0005", "0.001"]


def test_nodes_fetch_own_shards_and_run_from_copied_environment(
    cluster: Cluster, own: Path, digits: Path, tmp_path: Path
) -> None:
    """In an epoch each node fetches the shards of its own lanes, once for all its ranks."""
    small = tmp_path / "small"  # to be copied: an environment that leads to this one
    venv.create(small, symlinks=True)
    (purelib,) = small.glob("lib/python*/site-packages")
    (installed,) = Path(sys.prefix).glob("lib/python*/site-packages")
    used = tmp_path / "used"
    note = f"open({str(used)!r}, 'a').write(sys.prefix + '\\n')"
    (purelib / "installed.pth").write_text(f"import site, sys; site.addsitedir({str(installed)!r}); {note}\n")

    manifest = pack(digits / "images/train", tmp_path / "data", samples_per_shard=20)
    config = [
        *("cluster.scratch=" + str(tmp_path / "$SLURMD_NODENAME"), "cluster.environment.copy_to_scratch=true"),
        *("data.val=null", "data.shuffle_window=24", "train.length=25 steps", "train.save_every=null"),
    ]
    with FaultyServer(tmp_path / "data") as server:
        config.append(f"data.train={server.url}")
        run = cluster.submit(own, *with_settings(*config), python=small / "bin/python")
        assert run.wait() == "COMPLETED", run.log[-3000:]
    tars = {shard.sha256 for shard in manifest.shards}
    kept = [tars & {path.name for path in (tmp_path / node / "shards").rglob("*")} for node in ("n1", "n2")]
    assert len(set.union(*kept)) > 0.9 * len(tars)
    assert max(map(len, kept)) < 0.6 * len(tars)  # half, and those that lanes of both nodes begin or end in
    copies = {str(folder) for node in ("n1", "n2") for folder in (tmp_path / node).glob("environment-*")}
    assert len(copies) == 2
    assert set(used.read_text().splitlines()) == {str(small), *copies}


def test_all_programs_run_in_container(cluster: Cluster, own: Path, tmp_path: Path) -> None:
    """With a stand-in for Apptainer that notes the image and runs the program right here."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/images\nshift 2\nexec "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), cluster.env["PATH"]])
    config = with_settings("cluster.environment.container=/shared/pvt.sif", "train.length=5 steps")
    run = cluster.submit(own, *config, PATH=path)
    assert run.wait() == "COMPLETED", run.log[-3000:]
    # Two nodes: the pre-flight, the all-reduce and the ranks.
    assert (tmp_path / "images").read_text().split() == ["/shared/pvt.sif"] * 6


def test_shipped_sbatch_script_runs(cluster: Cluster, own: Path) -> None:
    """Given to sbatch as they are, from a checkout."""
    checkout = own.parent / "checkout"
    checkout.mkdir()
    for name in ("launch", "pipeline", "pvt", "slurm"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / ".venv").symlink_to(sys.prefix)
    shape = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]
    command = ["sbatch", "--parsable", *shape, "slurm/pretrain.sbatch", own, *with_settings("run.name=by-hand")]
    done = subprocess.run(command, cwd=checkout, env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Submitted(cluster, own.parent / "my runs/by-hand", {"job": done.stdout.strip()})
    assert run.wait() == "COMPLETED", run.log[-3000:]
    assert run.events("start")[0]["ranks"] == 2
    assert json.loads((run.folder / "result.json").read_text())["steps"] == STEPS


# Looking after it


def test_submit_reports_status_and_logs_and_stops_run(cluster: Cluster, own: Path) -> None:
    run = cluster.submit(own, *with_settings("train.length=2000 steps"))
    run.wait_for_step(30)
    known, told = status(cluster, run.folder)
    assert (known["phase"], known["job"]["state"], known["job"]["nodes"]) == ("running", "RUNNING", "n[1-2]")
    assert known["total_steps"] == 2000
    assert 30 <= known["step"] < 2000
    assert min(known["images_per_second"], known["left_s"]) > 0
    assert "to its time limit" in told

    log = cluster.command("logs", run.folder, "--lines", "3", "--rank", "0").stderr.splitlines()
    assert [line[:3] for line in log] == ["0: "] * 3
    following = cluster.begin("logs", run.folder, "--follow")
    second = cluster.command("--config", own, *with_settings("train.length=2000 steps"))
    assert second.returncode == 2
    assert f"is job {run.job} of SLURM already" in second.stderr

    assert cluster.command("stop", run.folder).returncode == 0
    _, followed = following.communicate(timeout=PATIENCE_S)
    assert "asks for the run to stop here" in followed
    until(lambda: status(cluster, run.folder)[0]["phase"] == "stopped", PATIENCE_S)
    stopped_at = run.events("stopped")[0]["step"]

    length = with_settings(f"train.length={stopped_at + 20} steps")
    again = cluster.submit(own, *length)
    assert again.wait() == "COMPLETED", again.log[-3000:]
    assert [event["step"] for event in again.events("start")] == [0, stopped_at]


def test_cancelled_job_is_not_requeued(cluster: Cluster, own: Path) -> None:
    run = cluster.submit(own, *with_settings("train.length=2000 steps"))
    run.wait_for_step(10)
    cluster.ask("scancel", run.job)
    assert run.wait() == "CANCELLED"
    assert [event["event"] for event in run.events()] == ["start", "stopping", "stopped", "ended"]
    assert json.loads((run.folder / "result.json").read_text())["requeue"]
    assert status(cluster, run.folder)[0]["phase"] == "stopped"


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.partition=gpus"], "cluster.partition gpus: there is none of this name, only cpu"),
        (["cluster.nodes=4"], "SLURM would not take the job (4 nodes of 0 GPUs and 1 CPUs): "),
        (["cluster.cpus_per_rank=64"], "SLURM would not take the job (2 nodes of 0 GPUs and 64 CPUs): "),
        (["cluster.gpus_per_node=8", "cluster.ranks_per_node=null"], "cluster.nodes 2 of 8 ranks are 16 ranks, but"),
        (["cluster.gpus_per_node=4", "cluster.ranks_per_node=null"], "SLURM would not take the job (2 nodes of 4 GPUs"),
        (["cluster.account=nobody's"], "cluster.account"),
        (["cluster.time=tomorrow"], "cluster.time"),
        (["cluster.time=5:00"], "cluster.time 5:00 is 300 s, of which cluster.grace_s 180 are kept for saving"),
        (["cluster.grace_s=20"], "cluster.grace_s 20 is not longer than train.preempt_deadline_s"),
        (["run.root=/proc/runs"], "/proc/runs/tiny: cannot be written: "),
    ],
)
def test_invalid_submission_is_rejected(cluster: Cluster, own: Path, overrides: list[str], message: str) -> None:
    done = cluster.command("--config", own, *with_settings(*overrides))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not cluster.ask("squeue", "--noheader")


def test_concurrent_submissions_of_one_run_submit_one_job(cluster: Cluster, own: Path) -> None:
    both = [cluster.begin("--config", own) for _ in range(2)]
    told = [each.communicate()[1] for each in both]
    try:
        assert sorted(each.returncode for each in both) == [0, 2]
        (refused,) = (text for each, text in zip(both, told, strict=True) if each.returncode)
        assert "is being submitted by somebody else" in refused or "of SLURM already" in refused
        assert len(cluster.ask("squeue", "--noheader", "--states=all", "--format=%i").split()) >= 1
    finally:
        cluster.ask("scancel", "--user=root")
        until(lambda: not cluster.ask("squeue", "--noheader"), PATIENCE_S)


def test_submission_without_slurm_is_rejected(cluster: Cluster, own: Path) -> None:
    folders = cluster.env["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not shutil.which("sinfo", path=folder))
    done = cluster.command("--config", own, PATH=path)
    assert done.returncode == 2
    assert "this machine has no SLURM. Submit from a login node" in done.stderr
    assert not (own.parent / "my runs").exists()
