"""Starts the fine-tuning jobs that a run's configuration lists under `handoff`, each once, and waits for them.

python launch/handoff.py RUN [--ranks N]

A run does this by itself when it has ended. The command can be repeated: it starts only the jobs that are missing.

    runs/PARENT/handoff/KEY.json    a claim: the child's UUID, its name and the exact version it starts from
    runs/PARENT/handoff/KEY.log     the child's output
    runs/PARENT/handoff/log         the output of this command where a run has started it

A claim is written exactly once, even by concurrent processes, and before its child is started. A child that is started
again is therefore the same run, which continues from its checkpoint or has nothing to do.
"""

import json
import logging
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
from pipeline.run_folder import CONFIG, finished_result
from pipeline.track.model_card import ModelCard
from pipeline.track.sync.outbox import Outbox, faults_of, is_given_up
from pipeline.track.sync.record import MAIN_METRIC, Record, new_uuid

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")


class Claim(BaseModel):
    """A hand-off that has been decided on: which child, from which version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str
    """The UUID of the child's run."""
    name: str
    """The child's run.name."""
    root: str
    model: str
    """models:/NAME/VERSION, never an alias."""
    config: str
    set: list[str]

    @classmethod
    def read(cls, path: Path) -> "Claim":
        """Returns the claim in a file. Raises InputError where it cannot be read or is invalid."""
        try:
            claim = read_json(cls, path)
            # The root follows from the parent's folder, not from the file: runs may have been moved together.
            root = path.parent.parent.parent
            return claim.model_copy(update={"root": str(root)})
        except OSError as error:
            raise InputError(f"--claim {path}: {error.strerror}: it is written by launch/handoff.py") from error
        except InputError as error:
            raise InputError(f"--claim {error}; it is not one that launch/handoff.py has written") from None

    def make(self, path: Path) -> "Claim":
        """Writes the claim unless there is one already; returns the one that is valid."""
        path.parent.mkdir(exist_ok=True)
        files.claim(path, self.model_dump_json(indent=1).encode() + b"\n")
        return Claim.read(path)

    def overrides(self, parent: Config) -> list[str]:
        """Returns the overrides for the child's configuration."""
        overrides = [
            *self.set,
            f"init.model={self.model}",
            f"run.name={self.name}",
            f"run.root={_quote_yaml(self.root)}",
        ]
        if parent.tracking.uri:
            overrides.append(f"tracking.uri={_quote_yaml(parent.tracking.uri)}")
        return overrides

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name

    def result(self) -> dict[str, Any] | None:
        """Returns the child's result if it has finished, otherwise None."""
        result = finished_result(self.folder)
        # The folder may belong to another run of the same name.
        if result is None or Record.read(self.folder).uuid != self.uuid:
            return None
        return result


def start_handoffs(folder: Path, ranks: int) -> None:
    """Starts launch/handoff.py in a process of its own, which outlives this one and then has its devices."""
    # Otherwise the children would take themselves for ranks of this run.
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    (folder / "handoff").mkdir(exist_ok=True)
    with (folder / "handoff" / "log").open("ab") as output:
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "launch/handoff.py"),
                str(folder),
                "--ranks",
                str(ranks),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    log.info(f"{folder}: hands off to {folder / 'handoff'}")


def check_handoffs(config: Config) -> None:
    """Raises InputError for an entry that could not be started when the run has ended, which may be weeks from now."""
    seen: set[str] = set()
    for entry in config.handoff:
        # The child's configuration is loaded for its errors.
        child_config(entry)
        # Claims are files named by these keys, so two entries would share one claim.
        key = entry_key(entry)
        if key in seen:
            raise InputError(f"handoff: {entry.config} is there twice with the same settings: remove one of them")
        seen.add(key)


def hand_off(folder: Path, ranks: int) -> dict[str, Any]:
    """Starts the jobs that are missing, one after the other; returns the command's result.

    Raises InputError for a run that has not ended, and ExternalError where its versions are not registered yet.
    """
    config = load_run_config(folder)
    if finished_result(folder) is None:
        raise InputError(f"{folder}: the run has not ended; start it again, and it hands off by itself")
    children = []
    refused = []
    (folder / "handoff").mkdir(exist_ok=True)
    # One command at a time: the children share the devices of this machine.
    with files.locked(folder / "handoff" / ".lock"):
        for entry in config.handoff:
            claim, why = decide(folder, config, entry)
            if claim is None:
                refused.append({"config": entry.config, "why": why})
                log.warning(f"{entry.config}: not started: {why}")
                continue
            children.append(_run_child(claim, claim_path(folder, entry), config, ranks))
    ok = all(child["result"] is not None for child in children)
    return {"run": str(folder), "ok": ok, "children": children, "refused": refused}


def load_run_config(folder: Path) -> Config:
    """Returns the configuration of the run in `folder`, with an absolute run.root, which its children share."""
    return with_root(load_config(folder / CONFIG), folder.resolve().parent)


def with_root(config: Config, root: Path) -> Config:
    run = config.run.model_copy(update={"root": str(root)})
    return config.model_copy(update={"run": run})


def cluster_of(config: Config, entry: HandoffConfig) -> ClusterConfig:
    """Returns the child's SLURM settings: those of its parent, unless its own configuration has any."""
    is_in_file = "cluster" in read_yaml(entry.config)
    is_overridden = any(override.startswith("cluster") for override in entry.set)
    return child_config(entry).cluster if is_in_file or is_overridden else config.cluster


def claim_path(folder: Path, entry: HandoffConfig) -> Path:
    """Returns the path of the claim of an entry of the run in `folder`."""
    return folder / "handoff" / f"{entry_key(entry)}.json"


def decide(folder: Path, config: Config, entry: HandoffConfig) -> tuple[Claim | None, str]:
    """Returns the entry's claim, which is written now if there is none; or None and why the job is not started.

    Raises ExternalError where the run's versions are not registered yet.
    """
    path = claim_path(folder, entry)
    # A decision stands, even if a better version has been registered since.
    if path.exists():
        return Claim.read(path), ""
    model, why = _choose_version(folder, entry, config.tracking.keep_versions)
    if model is None:
        return None, why
    claim = Claim(
        uuid=new_uuid(),
        name=child_name(config, entry),
        root=config.run.root,
        model=model,
        config=entry.config,
        set=entry.set,
    )
    return claim.make(path), ""


def _choose_version(folder: Path, entry: HandoffConfig, keep_best: int) -> tuple[str | None, str]:
    """Returns the best version that is still registered and passes the entry's gate; or None and why there is none."""
    outbox = Outbox(folder)
    metric = Record.read(folder).tags[MAIN_METRIC]
    registered = outbox.registered()
    if not registered:
        raise ExternalError(
            f"{folder}: none of its versions is registered yet: `python launch/registry.py sync {folder}` does that "
            "once the tracking server can be reached"
        )
    scores = outbox.scores(metric)
    by_score = sorted(registered, key=lambda version: scores.get(version, float("-inf")), reverse=True)
    last = max((version for version in registered if not is_given_up(version)), default=None)
    why = ""
    for rank, version in enumerate(by_score):
        # The registry has kept only the best ones and the last one.
        if rank >= keep_best and version != last:
            continue
        faults = faults_of(version) + _failed_gates(entry, ModelCard.read(version).metrics)
        if not faults:
            return registered[version], ""
        why = f"{registered[version]}: {'; '.join(faults)}"
    return None, why


def _failed_gates(entry: HandoffConfig, metrics: dict[str, float | None]) -> list[str]:
    failed = []
    for name, bound in entry.gate.items():
        value = metrics.get(name)
        if not bound.holds(value):
            failed.append(f"{name} is {value}, but {bound} is required")
    return failed


def child_name(config: Config, entry: HandoffConfig) -> str:
    """Returns the child's run.name. One that the entry does not set is put behind its parent's."""
    name = child_config(entry).run.name
    if _has_name(entry):
        return name
    words = [config.run.name, name]
    unnamed = [other for other in config.handoff if other.config == entry.config and not _has_name(other)]
    # Several entries may use one file with different settings.
    if len(unnamed) > 1:
        words.append(entry_key(entry)[:4])
    return "-".join(words)


def entry_key(entry: HandoffConfig) -> str:
    """Returns the name of the entry's files: a fingerprint of its configuration file's name and its overrides."""
    return fingerprint(entry.model_dump(include={"config", "set"}))[:12]


def child_config(entry: HandoffConfig) -> Config:
    """Returns the child's configuration, with a placeholder for the version that it starts from."""
    return load_config(entry.config, [*entry.set, "init.model=models:/NAME/1"])


def _quote_yaml(text: str) -> str:
    """Returns a text as the value of an override, in which ` #` would begin a comment."""
    return json.dumps(text, ensure_ascii=False)


def _has_name(entry: HandoffConfig) -> bool:
    return any(override.startswith("run.name=") for override in entry.set)


def _run_child(claim: Claim, path: Path, config: Config, ranks: int) -> dict[str, Any]:
    """Runs the child on this machine unless it has finished; returns what the command's result says of it."""
    _wait_until_idle(claim.folder)
    if claim.result() is None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        arguments = ["--config", claim.config, "--claim", str(path)]
        for override in claim.overrides(config):
            arguments += ["--set", override]
        command = [
            sys.executable,
            *torchrun,
            f"--nproc-per-node={ranks}",
            str(ROOT / "launch/finetune.py"),
            *arguments,
        ]
        log_path = path.with_suffix(".log")
        log.info(f"{claim.folder}: fine-tuning {claim.model}; see {log_path}")
        with log_path.open("ab") as output:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    return {"run": str(claim.folder), "uuid": claim.uuid, "from": claim.model, "result": claim.result()}


def _wait_until_idle(folder: Path) -> None:
    # A child may have outlived the command that started it.
    if (folder / LOCK).exists():
        with files.locked(folder / LOCK):
            pass
