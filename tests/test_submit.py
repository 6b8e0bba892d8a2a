"""What launch/submit.py writes and puts into the queue, without a cluster; tests/slurm has the rest."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commands import submit
from pipeline.config import load_config
from tests.conftest import write_config


class Slurm:
    """In the place of pipeline.cluster.slurm: takes all jobs, and keeps their scripts."""

    def __init__(self) -> None:
        self.scripts: list[str] = []

    def refusal(self, script: str) -> None:
        pass

    def submit(self, script: str, *, dependency: str | None = None) -> str:
        self.scripts.append(script)
        return str(len(self.scripts))


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    monkeypatch.setattr(submit, "slurm", slurm)
    monkeypatch.setattr(submit, "snapshot", lambda folder, *, diff: folder.mkdir())
    return slurm


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *map(str, arguments)])
    return submit.main()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with tiny.yaml, whose runs are in "my runs", and child.yaml."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tree = yaml.safe_load(write_config(folder, folder).read_text())
    tree |= {"run": {"name": "tiny", "root": "my runs"}, "cluster": {"gpus_per_node": 1}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "child.yaml").write_text(yaml.safe_dump({**tree, "run": {"name": "child"}}))
    return folder


def test_relative_run_root_is_resolved_at_submission(
    project: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    handoff = json.dumps([{"config": str(project / "child.yaml")}])
    document = command(monkeypatch, "--config", "tiny.yaml", "--set", f"handoff={handoff}")
    root = project / "my runs"
    assert document["run"] == str(root / "tiny")
    assert list(document["handoffs"]) == [str(root / "tiny-child")]
    assert load_config(root / "tiny/slurm/config.yaml").run.root == str(root)
    outputs = [shlex.split(line)[1] for script in slurm.scripts for line in script.splitlines() if "--output" in line]
    assert outputs == [f"--output={root}/{name}/slurm/log" for name in ("tiny", "tiny-child")]


def test_relative_run_root_is_resolved_for_each_run_of_a_sweep(
    project: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = command(monkeypatch, "--config", "tiny.yaml", "--sweep", "run.seed=1,2")
    root = project / "my runs"
    assert document["sweep"] == [f"{root}/tiny-0", f"{root}/tiny-1"]
    tasks = [load_config(root / f"tiny/slurm/task-{number}.yaml") for number in (0, 1)]
    assert [(task.run.root, task.run.seed) for task in tasks] == [(str(root), 1), (str(root), 2)]
