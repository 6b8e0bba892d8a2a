"""Start the fine-tuning jobs that a run's configuration lists under `handoff`, each once, and wait for them.

python launch/handoff.py RUN [--ranks N]

A run does this by itself when it has ended. Doing it again finds what has been done and does the rest.

    runs/PARENT/handoff/KEY.json    a claim: the child's UUID, its name and the exact version it starts from
    runs/PARENT/handoff/KEY.log     what the child says
    runs/PARENT/handoff/log         what this command says when a run has started it

A claim is made once, whoever tries, and before its child is started. So a child that is started again is the same
one, which goes on where it was or has nothing to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import ClusterConfig, Config, HandoffConfig, fingerprint, load_config, read_json, read_yaml
from pipeline.errors import ExternalError, InputError
from pipeline.lease import LOCK
from pipeline.track.model_card import ModelCard
from pipeline.track.sync.outbox import Outbox, faults_of, is_given_up
from pipeline.track.sync.record import MAIN_METRIC, Record, new_uuid

ROOT = Path(__file__).resolve().parents[2]

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")


class Claim(BaseModel):
    """A hand-off that has been decided on: which child, from which version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str
    """Of the child's run."""
    name: str
    """The child's run.name."""
    root: str
    model: str
    """models:/NAME/VERSION, never an alias."""
    config: str
    set: list[str]

    @classmethod
    def read(cls, path: Path) -> "Claim":
        """Its root is where the parent's folder is now: runs may have been moved together."""
        try:
            claim = read_json(cls, path)
            return claim.model_copy(update={"root": str(path.parent.parent.parent)})
        except OSError as error:
            raise InputError(f"--claim {path}: {error.strerror}: it is written by launch/handoff.py") from error
        except InputError as error:
            raise InputError(f"--claim {error}; it is not one that launch/handoff.py has written") from None

    def make(self, path: Path) -> "Claim":
        """Write the claim, unless there is one: returns the one that holds."""
        path.parent.mkdir(exist_ok=True)
        files.claim(path, self.model_dump_json(indent=1).encode() + b"\n")
        return Claim.read(path)

    def overrides(self, parent: Config) -> list[str]:
        """What the child's configuration is given."""
        uri = [f"tracking.uri={_yaml(parent.tracking.uri)}"] if parent.tracking.uri else []
        return [*self.set, f"init.model={self.model}", f"run.name={self.name}", f"run.root={_yaml(self.root)}", *uri]

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name

    def result(self) -> dict[str, Any] | None:
        """The child's, if it has finished."""
        path = self.folder / "result.json"
        if not path.exists() or Record.read(self.folder).uuid != self.uuid:
            return None
        result = read_json(dict[str, Any], path)
        return None if result.get("requeue") else result


def start_handoffs(folder: Path, ranks: int) -> None:
    """Do it in a process of its own, which has this one's devices once this one has ended."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    (folder / "handoff").mkdir(exist_ok=True)
    with (folder / "handoff" / "log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch/handoff.py"), str(folder), "--ranks", str(ranks)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    print(f"{folder}: hands off to {folder / 'handoff'}", file=sys.stderr, flush=True)


def check_handoffs(config: Config) -> None:
    """Raises InputError for an entry that could not be started when the run has ended, which may be weeks from now."""
    seen: set[str] = set()
    for entry in config.handoff:
        child_of(entry)
        if key_of(entry) in seen:
            raise InputError(f"handoff: {entry.config} is there twice with the same settings: leave one out")
        seen.add(key_of(entry))


def hand_off(folder: Path, ranks: int) -> dict[str, Any]:
    """Start what has to be started, one job after the other.

    Raises InputError for a run that has not ended, and ExternalError where its versions are not registered yet.
    """
    config = settings_of(folder)
    _require_end(folder)
    children, refused = [], []
    (folder / "handoff").mkdir(exist_ok=True)
    with files.locked(folder / "handoff" / ".lock"):
        for entry in config.handoff:
            claim, why = decide(folder, config, entry)
            if claim is None:
                refused.append({"config": entry.config, "why": why})
                print(f"{entry.config}: not started: {why}", file=sys.stderr, flush=True)
                continue
            children.append(_run(claim, path_of(folder, entry), config, ranks))
    ok = all(child["result"] is not None for child in children)
    return {"run": str(folder), "ok": ok, "children": children, "refused": refused}


def settings_of(folder: Path) -> Config:
    """The configuration of the run in `folder`. Its run.root, which the children share, holds in any working
    directory."""
    return with_root(load_config(folder / "config.yaml"), folder.resolve().parent)


def with_root(config: Config, root: Path) -> Config:
    run = config.run.model_copy(update={"root": str(root)})
    return config.model_copy(update={"run": run})


def cluster_of(config: Config, entry: HandoffConfig) -> ClusterConfig:
    """What the child asks of SLURM: the same as its parent, unless it says otherwise."""
    own = "cluster" in read_yaml(entry.config) or any(text.startswith("cluster") for text in entry.set)
    return child_of(entry).cluster if own else config.cluster


def path_of(folder: Path, entry: HandoffConfig) -> Path:
    """Where the claim of an entry of the run in `folder` is."""
    return folder / "handoff" / f"{key_of(entry)}.json"


def decide(folder: Path, config: Config, entry: HandoffConfig) -> tuple[Claim | None, str]:
    """The entry's claim, which is made now if there is none; or why the job is not started.

    Raises ExternalError where the run's versions are not registered yet.
    """
    path = path_of(folder, entry)
    if path.exists():
        return Claim.read(path), ""
    model, why = _choose(folder, entry, config.tracking.keep_versions)
    if model is None:
        return None, why
    claim = Claim(
        uuid=new_uuid(),
        name=name_of(config, entry),
        root=config.run.root,
        model=model,
        config=entry.config,
        set=entry.set,
    )
    return claim.make(path), ""


def _require_end(folder: Path) -> None:
    path = folder / "result.json"
    result = read_json(dict[str, Any], path) if path.exists() else {"requeue": True}
    if result.get("requeue"):
        raise InputError(f"{folder}: the run has not ended; start it again, and it hands off by itself")


def _choose(folder: Path, entry: HandoffConfig, keep_best: int) -> tuple[str | None, str]:
    """The best of the run's versions that stay registered that passes the entry's gate; or None and why."""
    outbox, metric = Outbox(folder), Record.read(folder).tags[MAIN_METRIC]
    registered = outbox.registered()
    if not registered:
        raise ExternalError(
            f"{folder}: none of its versions is registered yet: `python launch/registry.py sync {folder}` does that "
            "once the tracking server can be reached"
        )
    scores, why = outbox.scores(metric), ""
    by_score = sorted(registered, key=lambda each: scores.get(each, float("-inf")), reverse=True)
    last = max((each for each in registered if not is_given_up(each)), default=None)
    for place, version in enumerate(by_score):
        if place >= keep_best and version != last:
            continue  # has been removed
        metrics = ModelCard.read(version).metrics
        failed = faults_of(version) + [
            f"{name} is {metrics.get(name)}, but {bound} is asked for"
            for name, bound in entry.gate.items()
            if not bound.holds(metrics.get(name))
        ]
        if not failed:
            return registered[version], ""
        why = f"{registered[version]}: {'; '.join(failed)}"
    return None, why


def name_of(config: Config, entry: HandoffConfig) -> str:
    """The child's run.name."""
    name = child_of(entry).run.name
    if not _is_named(entry):
        alike = [other for other in config.handoff if other.config == entry.config and not _is_named(other)]
        name = "-".join([config.run.name, name, *([key_of(entry)[:4]] if len(alike) > 1 else [])])
    return name


def key_of(entry: HandoffConfig) -> str:
    return fingerprint(entry.model_dump(include={"config", "set"}))[:12]


def child_of(entry: HandoffConfig) -> Config:
    """The child's configuration, but for the version that it starts from."""
    return load_config(entry.config, [*entry.set, "init.model=models:/NAME/1"])


def _yaml(text: str) -> str:
    """A text as the value of an override, in which ` #` would begin a comment."""
    return json.dumps(text, ensure_ascii=False)


def _is_named(entry: HandoffConfig) -> bool:
    return any(override.startswith("run.name=") for override in entry.set)


def _run(claim: Claim, path: Path, config: Config, ranks: int) -> dict[str, Any]:
    """Run the child unless it has finished, as ranks of this machine, and wait for it."""
    child = {"run": str(claim.folder), "uuid": claim.uuid, "from": claim.model}
    _wait_for(claim.folder)
    if claim.result() is None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        arguments = ["--config", claim.config, "--claim", str(path)]
        for override in claim.overrides(config):
            arguments += ["--set", override]
        job = [str(ROOT / "launch/finetune.py"), *arguments]
        whole = [sys.executable, *torchrun, f"--nproc-per-node={ranks}", *job]
        print(f"{claim.folder}: fine-tuning {claim.model}; see {path.with_suffix('.log')}", file=sys.stderr, flush=True)
        with path.with_suffix(".log").open("ab") as log:
            subprocess.run(whole, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return {**child, "result": claim.result()}


def _wait_for(folder: Path) -> None:
    """Until no job is at work in it: a child may have outlived the command that started it."""
    if (folder / LOCK).exists():
        with files.locked(folder / LOCK):
            pass
