"""Hand-off: a finished run starts its fine-tuning jobs, each once, from the exact version that it made."""

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from pipeline.config import Bound, ClassificationConfig, HandoffConfig, ImageConfig, ModelConfig, load_config
from pipeline.errors import InputError
from pipeline.job import handoff
from pipeline.job.handoff import Claim
from pipeline.shards.pack import pack
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import MAIN_METRIC, Record
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, ROOT, start


@pytest.fixture(scope="module")
def jobs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations of a parent, on digits from 0 to 6, and of a child on 7, 8 and 9."""
    folder = tmp_path_factory.mktemp("handoff")
    images = folder / "images"
    for classes in ("0-6", "7-9"):
        command = [sys.executable, "launch/digits.py", "--out", images / classes, "--classes", classes]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        manifest = pack(images / classes / "train", folder / classes / "train")
        pack(images / classes / "val", folder / classes / "val", classes=manifest.classes)
    tree = yaml.safe_load(write_config(digits, folder).read_text())
    tree["mix"], tree["train"]["log_every"] = {}, "10 steps"
    child = {**tree, "run": {"name": "child"}, "data": {**tree["data"], **_data(folder / "7-9")}}
    child["train"] = {**tree["train"], "length": "40 steps", "save_every": "5 steps"}
    (folder / "child.yaml").write_text(yaml.safe_dump(child))
    parent = {**tree, "data": {**tree["data"], **_data(folder / "0-6")}}
    parent["train"] = {**tree["train"], "length": "60 steps"}
    parent["handoff"] = [
        {"config": str(folder / "child.yaml"), "gate": {"top1": {"min": 0.3}}},
        {"config": str(folder / "child.yaml"), "set": ["run.name=never"], "gate": {"top1": {"min": 1.01}}},
    ]
    (folder / "parent.yaml").write_text(yaml.safe_dump(parent))
    return folder


def _data(folder: Path) -> dict[str, str]:
    return {"train": str(folder / "train"), "val": str(folder / "val")}


def run(target: str, *arguments: object, log: Path) -> dict[str, Any]:
    """The result of a command that ends with 0."""
    (process,) = start(1, target, arguments, [log])
    process.wait(PATIENCE_S)
    assert process.returncode == 0, log.with_suffix(".err").read_text()
    return json.loads(log.with_suffix(".out").read_text().splitlines()[-1])


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(claim: Path) -> list[int]:
    """Of a hand-off's child."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(claim).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
def test_parent_killed_during_handoff_has_one_child(jobs: Path, tmp_path: Path) -> None:
    """Kill whoever hands off, and what it has started, at three moments; start the parent again each time."""
    parent, folder = jobs / "parent.yaml", jobs / "runs" / "tiny"
    root = f"run.root={jobs / 'runs'}"
    result = run("launch/pretrain.py", "--config", parent, "--set", root, log=tmp_path / "parent")
    assert result["model"] == "models:/tiny/1"

    def claims() -> list[Path]:
        return [path for path in (folder / "handoff").glob("*.json") if not path.name.startswith(".")]

    wait_for(claims)  # the run has begun to hand off by itself
    (path,) = claims()
    first = Claim.read(path)
    wait_for(lambda: processes_of(path))
    killed = 0
    for moment in ("at once", "training", "finished"):
        if moment == "training":
            wait_for(lambda: list((first.folder / "checkpoints").glob("step-00000010/COMMIT.json")))
        if moment == "finished":
            wait_for(lambda: (first.folder / "result.json").exists())
        for pid in [*processes_of(folder / "handoff"), *handing_off(folder)]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        run("launch/pretrain.py", "--config", parent, "--set", root, log=tmp_path / moment)
    assert killed >= 2
    done = run("launch/handoff.py", folder, log=tmp_path / "again")
    assert claims() == [path]
    assert Claim.read(path) == first
    (child,) = done["children"]
    assert (child["run"], child["uuid"], child["from"]) == (str(first.folder), first.uuid, "models:/tiny/1")
    assert child["result"]["steps"] == 40
    assert child["result"]["top1"] > 0.6  # chance is a third
    (refused,) = done["refused"]
    assert "top1 is" in refused["why"]
    assert "but at least 1.01 is required" in refused["why"]
    assert not (jobs / "runs" / "never").exists()

    client = MlflowClient(f"sqlite:///{jobs}/runs/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    children = client.search_runs(experiments, "tags.`parent.version` = 'models:/tiny/1'")
    assert [found.data.tags["run.uuid"] for found in children] == [first.uuid]
    assert children[0].info.status == "FINISHED"
    assert children[0].data.tags["mlflow.parentRunId"] == result["run_id"]
    assert f"child.{first.uuid}" in client.get_model_version("tiny", "1").tags
    assert f"child.{first.uuid}" in client.get_run(result["run_id"]).data.tags
    versions = list(client.search_model_versions("name='tiny-child'"))
    assert [version.tags["parent"] for version in versions] == ["models:/tiny/1"]
    state = json.loads(max((first.folder / "checkpoints").glob("step-*/state.json")).read_text())["state"]
    assert state["step"] == 40


def handing_off(folder: Path) -> list[int]:
    """Processes of launch/handoff.py for a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(ROOT / "launch/handoff.py").encode() in words and str(folder).encode() in words:
            found.append(int(entry.parent.name))
    return found


def test_concurrent_claims_create_one(tmp_path: Path) -> None:
    path = tmp_path / "handoff" / "key.json"
    with multiprocessing.get_context("fork").Pool(8) as pool:
        uuids = pool.starmap(_make, [(path, number) for number in range(64)])
    assert len(set(uuids)) == 1
    assert [each.name for each in path.parent.iterdir()] == ["key.json"]


def _make(path: Path, number: int) -> str:
    claim = Claim(uuid=f"{number:032x}", name="child", root="runs", model="models:/m/1", config="c.yaml", set=[])
    return claim.make(path).uuid


def test_child_folder_follows_moved_parent(tmp_path: Path) -> None:
    claim = Claim(uuid="a" * 32, name="child", root=f"{tmp_path}/old", model="models:/m/1", config="c.yaml", set=[])
    path = tmp_path / "old" / "parent" / "handoff" / "key.json"
    path.parent.mkdir(parents=True)
    assert claim.make(path) == claim
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Claim.read(tmp_path / "new" / "parent" / "handoff" / "key.json")
    assert moved.folder == tmp_path / "new" / "child"
    assert moved.result() is None
    assert not (tmp_path / "old").exists()


def test_second_child_start_exits_with_0_and_other_run_is_rejected(digits: Path, tmp_path: Path) -> None:
    path = write_config(digits, tmp_path)  # any job will do
    folder = tmp_path / "runs" / "tiny"
    claim = Claim(uuid="a" * 32, name="tiny", root=str(tmp_path / "runs"), model="models:/m/1", config="", set=[])
    claim.make(tmp_path / "mine" / "claim.json")
    claim.model_copy(update={"uuid": "b" * 32}).make(tmp_path / "other" / "claim.json")
    folder.mkdir(parents=True)
    Record.begin(folder, "tiny", uuid_=claim.uuid, tags={}, inputs=[])
    job = ["--config", path, "--set", f"run.root={tmp_path / 'runs'}", "--claim"]

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        twice = run("launch/pretrain.py", *job, tmp_path / "mine" / "claim.json", log=tmp_path / "twice")
    assert twice["at_work"]
    (process,) = start(1, "launch/pretrain.py", [*job, tmp_path / "other" / "claim.json"], [tmp_path / "strange"])
    assert process.wait(PATIENCE_S) == 2
    assert "is another run's: choose another run.name for the hand-off" in (tmp_path / "strange.err").read_text()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{config: nowhere.yaml}]", r"nowhere\.yaml: cannot read the configuration"),
        ("[{config: CHILD, set: [optim.lrr=1]}]", r"optim\.lrr: no such setting; did you mean optim\.lr\?"),
        ("[{config: CHILD}, {config: CHILD}]", "is there twice with the same settings"),
    ],
)
def test_invalid_handoff_is_rejected_at_start(tmp_path: Path, entries: str, message: str) -> None:
    path = write_config(tmp_path, tmp_path)
    with pytest.raises(InputError, match=message):
        handoff.check_handoffs(load_config(path, [f"handoff={entries.replace('CHILD', str(path))}"]))


def test_handoff_from_other_working_directory_finds_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose run.root is relative, in a folder whose name would be cut short if it were read as bare YAML."""
    tree = yaml.safe_load(write_config(tmp_path, tmp_path).read_text())
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({**tree, "run": {"name": "child"}}))
    folder = tmp_path / "of #7" / "runs" / "tiny"
    folder.mkdir(parents=True)
    Record.begin(folder, "tiny", tags={MAIN_METRIC: "top1"}, inputs=[])
    tree |= {"run": {"name": "tiny", "root": "runs"}, "handoff": [{"config": str(child)}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "result.json").write_text("{}")
    offer(folder, 1, top1=0.9, val_loss=1.0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    done = handoff.hand_off(folder, ranks=1)
    assert [each["run"] for each in done["children"]] == [str(folder.parent / "tiny-child")]
    (command,) = commands
    overrides = [word for before, word in itertools.pairwise(command) if before == "--set"]
    started = load_config(child, overrides)
    assert started.run.folder == folder.parent / "tiny-child"
    assert (
        tracking_server.tracking_uri(started.tracking.uri, started.run.root) == f"sqlite:///{folder.parent}/mlflow.db"
    )
    assert list((tmp_path / "elsewhere").iterdir()) == []


def offer(folder: Path, step: int, uri: str | None = None, **metrics: float | None) -> Path:
    """A version of the run in `folder`, registered as `uri`."""
    weights = folder / "weights"
    weights.write_bytes(b"%d" % step)
    card = ModelCard(
        task=ClassificationConfig(),
        model=ModelConfig(name="pvt_pico"),
        image=ImageConfig(),
        eval_batch_size=1,
        classes=["a"],
        metrics=metrics,
        sha256={WEIGHTS: f"{step:064x}"[::-1]},
        lineage={"step": str(step)},
    )
    entry = Outbox(folder).put({WEIGHTS: weights}, card)
    Outbox(folder).note(entry, uri or f"models:/tiny/{step}")
    return entry


def test_removed_version_is_not_handed_off(tmp_path: Path) -> None:
    """Of three, with room for the best one and the last: the second, which alone passes the gate, is gone."""
    Record.begin(tmp_path, "tiny", tags={MAIN_METRIC: "top1"}, inputs=[])
    for step, (top1, val_loss) in enumerate([(0.9, 3.0), (0.8, 1.0), (0.7, 2.0)], 1):
        offer(tmp_path, step, top1=top1, val_loss=val_loss)

    def chosen(most: float, keep_best: int) -> str | None:
        gate = {"val_loss": Bound(max=most)}
        return handoff._choose_version(tmp_path, HandoffConfig(config="c.yaml", gate=gate), keep_best)[0]

    assert chosen(1.5, keep_best=1) is None
    assert chosen(1.5, keep_best=2) == "models:/tiny/2"
    assert chosen(2.5, keep_best=1) == "models:/tiny/3"
    assert chosen(3.5, keep_best=1) == "models:/tiny/1"


@pytest.mark.parametrize("gate", [{}, {"top1": Bound(min=0.1)}, {"val_loss": Bound(max=9.0)}])
def test_rolled_back_or_non_finite_version_is_not_handed_off(tmp_path: Path, gate: dict[str, Bound]) -> None:
    Record.begin(tmp_path, "tiny", tags={MAIN_METRIC: "top1"}, inputs=[])
    good = offer(tmp_path, 10, top1=0.3, val_loss=1.0)
    offer(tmp_path, 20, top1=0.9, val_loss=1.0, top5=None)
    offer(tmp_path, 35, top1=0.8, val_loss=1.0)
    outbox = Outbox(tmp_path)
    outbox.give_up(since=30, step=37)
    assert outbox.scores("top1") == {good: 0.3}
    assert list(outbox.given_up()) == ["models:/tiny/35"]
    entry = HandoffConfig(config="c.yaml", gate=gate)
    assert handoff._choose_version(tmp_path, entry, keep_best=1)[0] == "models:/tiny/10"
    outbox.give_up(since=0, step=37)
    model, why = handoff._choose_version(tmp_path, entry, keep_best=9)
    assert model is None
    assert "were rolled back" in why


def test_rolled_back_version_is_never_registered(tmp_path: Path) -> None:
    entry = offer(tmp_path, 35, top1=0.8)
    (entry / "registered.json").unlink()
    (entry / WEIGHTS).touch()
    outbox = Outbox(tmp_path)
    assert outbox.waiting() == [entry]
    outbox.give_up(since=30, step=37)
    assert outbox.waiting() == []
    outbox.trim(1, "top1")
    assert not entry.exists()


def test_invalid_claim_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"uuid": 3}')
    with pytest.raises(InputError, match=r"claim\.json: uuid: .*; it is not one that launch/handoff\.py has written"):
        Claim.read(tmp_path / "claim.json")
