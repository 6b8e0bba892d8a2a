"""Submit a run to SLURM, and look after it.

python launch/submit.py --config FILE [--set KEY=VALUE …] [--sweep KEY=A,B,… …] [--dry-run]
python launch/submit.py status|logs|stop RUN

    FILE ──▶ runs/NAME/slurm/  config.yaml  code-TIME/  job.sbatch ──sbatch──▶ launch/supervise.py on the first node
                               jobs.json  events.jsonl  log

With the run go its hand-offs, each a job that waits for the run's end. A sweep is one job of an array a run.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import cli, files, yaml_text
from pipeline.cluster import script, slurm, status
from pipeline.cluster.script import quoted
from pipeline.cluster.supervise import LOG, SLURM, STOP
from pipeline.config import Config, HandoffConfig, dump_config, load_config, read_json
from pipeline.errors import ExternalError, InputError
from pipeline.job import handoff
from pipeline.redact import redact
from pipeline.track.code_version import snapshot
from pipeline.track.sync.record import new_uuid

JOBS = "jobs.json"


class Submission(NamedTuple):
    """A batch script and whose it is."""

    config: Config
    script: str

    @property
    def folder(self) -> Path:
        return self.config.run.folder


def main() -> dict[str, Any]:
    if sys.argv[1:2] and sys.argv[1] in LOOK_AFTER:
        return cli.choose("launch/submit.py", "Look after a run on SLURM.", LOOK_AFTER)
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description="Submit a run to SLURM.",
        epilog=f"To look after it: launch/submit.py {'|'.join(LOOK_AFTER)} RUN",
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="a run for each value, and for each combination if there are several of these",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and write nothing")
    arguments = parser.parse_args()
    config = _load(arguments.config, arguments.set)
    runs = [(config, {})] if not arguments.sweep else _sweep(arguments.config, arguments.set, arguments.sweep)
    for each, _ in runs:
        script.check_batch_script(each)
        handoff.check_handoffs(each)
    if arguments.dry_run:
        from pipeline.job import start_checks  # what it imports in turn takes seconds

        for each, _ in runs:
            print(
                f"{each.run.name}: {start_checks.forecast(each, each.cluster.nodes * each.cluster.ranks)}",
                file=sys.stderr,
            )
    code = config.run.folder / SLURM / time.strftime("code-%Y%m%dT%H%M%S")
    main_job = _job(config, code, len(runs) if arguments.sweep else None)
    children = [_handoff_job(config, entry, code) for entry in config.handoff]
    jobs = [main_job, *children]
    if arguments.dry_run:
        return _show(jobs)
    for job in jobs:
        _require_possible(job)
    with _held(config.run.folder):
        snapshot(code, diff=config.tracking.log_diff)
        return _submit(main_job, children, runs if arguments.sweep else [])


def _sweep(file: str, overrides: list[str], sweeps: list[str]) -> list[tuple[Config, dict[str, Any]]]:
    """The runs of a sweep, each with its own settings."""
    choices: list[list[tuple[str, Any]]] = []
    for each in sweeps:
        key, equals, text = each.partition("=")
        values = yaml_text.read(f"[{text}]", f"--sweep {each!r}")
        if not equals or not values:
            raise InputError(f"--sweep {each!r}: expected KEY=A,B,… such as --sweep optim.lr=1e-3,5e-4")
        choices.append([(key, value) for value in values])
    runs = []
    base = _load(file, overrides)
    if base.handoff:
        raise InputError(f"{file}: handoff with --sweep: leave it out, and hand off from the best of the runs")
    for number, chosen in enumerate(itertools.product(*choices)):
        own = [f"{key}={json.dumps(value)}" for key, value in chosen]
        name = f"run.name={base.run.name}-{number}"
        runs.append((_load(file, [*overrides, *own, name]), dict(chosen)))
    return runs


def _load(file: str, overrides: list[str]) -> Config:
    """The configuration with an absolute run.root: what follows the run may be started in another folder."""
    config = load_config(file, overrides)
    return handoff.with_root(config, Path(config.run.root).resolve())


def _job(config: Config, code: Path, array: int | None = None) -> Submission:
    folder = config.run.folder
    log = f"{folder}-%a/{LOG}" if array else folder / LOG
    # Quoted in two pieces, for the shell has to see the variable.
    words = (
        f'--config {quoted(folder / SLURM)}/task-"$SLURM_ARRAY_TASK_ID".yaml'
        if array
        else quoted("--config", folder / SLURM / "config.yaml")
    )
    return Submission(config, _render(config, log, code, words, array))


def _handoff_job(config: Config, entry: HandoffConfig, code: Path) -> Submission:
    """A job that trains what the run in `settings` hands off to."""
    child = handoff.child_of(entry)
    run = child.run.model_copy(update={"name": handoff.name_of(config, entry), "root": config.run.root})
    child = child.model_copy(update={"run": run, "cluster": handoff.cluster_of(config, entry)})
    script.check_batch_script(child)
    words = quoted("--of", config.run.folder, "--handoff", handoff.key_of(entry))
    return Submission(child, _render(child, child.run.folder / LOG, code, words))


def _render(config: Config, log: Path | str, code: Path, words: str, array: int | None = None) -> str:
    activated = config.cluster.environment.activate is not None
    return script.render_batch_script(
        config.cluster,
        name=config.run.name,
        log=log,
        code=quoted(code),
        command=words,
        array=array,
        python="python" if activated else quoted(sys.executable),
    )


def _show(jobs: list[Submission]) -> dict[str, Any]:
    for job in jobs:
        print(redact(job.script))
    try:
        for job in jobs:
            _require_possible(job)
    except InputError as error:
        if "has no SLURM" not in str(error):
            raise
        print("SLURM was not asked whether it would take this: there is none on this machine", file=sys.stderr)
    return {"dry_run": True, "run": str(jobs[0].folder), "jobs": len(jobs)}


def _require_possible(job: Submission) -> None:
    """Raises InputError for what SLURM would not take."""
    cluster = job.config.cluster
    if cluster.partition and cluster.partition not in (known := slurm.partitions()):
        raise InputError(f"cluster.partition {cluster.partition}: there is none of this name, only {', '.join(known)}")
    if why := slurm.refusal(job.script):
        cpus = cluster.ranks * cluster.cpus_per_rank
        shape = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs and {cpus} CPUs"
        raise InputError(f"{job.folder}: SLURM would not take the job ({shape}): {why}; see the cluster section")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The run's folder, for as long as it takes to submit. Raises InputError where the run has a job already, or the
    folder cannot be written."""
    with contextlib.ExitStack() as held:
        try:
            (folder / SLURM).mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(folder / SLURM / ".lock", wait=False))
        except BlockingIOError:
            raise InputError(f"{folder}: is being submitted by somebody else") from None
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written: {error.strerror}: set run.root to a folder that can"
            ) from error
        job = _jobs(folder).get("job")
        if job and slurm.states(job):
            raise InputError(
                f"{folder}: is job {job} of SLURM already: `python launch/submit.py status {folder}` tells how it is; "
                "stop it, or give this one a run.name"
            )
        (folder / STOP).unlink(missing_ok=True)
        yield


def _submit(job: Submission, children: list[Submission], sweep: list[tuple[Config, dict[str, Any]]]) -> dict[str, Any]:
    """Write what the jobs need, and put them into the queue."""
    parent = {"uuid": new_uuid(), "name": job.config.run.name}
    for number, (each, chosen) in enumerate(sweep):
        files.write(job.folder / SLURM / f"task-{number}.yaml", dump_config(each).encode(), private=True)
        (each.run.folder / SLURM).mkdir(parents=True, exist_ok=True)
        _write(each.run.folder / SLURM / "sweep.json", {**parent, "set": chosen})
    files.write(job.folder / SLURM / "config.yaml", dump_config(job.config).encode(), private=True)
    submitted = _put(job)
    document: dict[str, Any] = {"job": submitted, "handoffs": {}, "sweep": [str(each.run.folder) for each, _ in sweep]}
    for number, (each, _) in enumerate(sweep):
        _write(each.run.folder / SLURM / JOBS, {"job": f"{submitted}_{number}", "handoffs": {}, "sweep": []})
    try:
        for child in children:
            (child.folder / SLURM).mkdir(parents=True, exist_ok=True)
            (child.folder / STOP).unlink(missing_ok=True)
            number = _put(child, dependency=f"afterok:{submitted}")
            document["handoffs"][str(child.folder)] = number
            _write(child.folder / SLURM / JOBS, {"job": number, "handoffs": {}, "sweep": []})
    except (ExternalError, OSError):
        slurm.ask("scancel", submitted, *document["handoffs"].values())
        raise
    _write(job.folder / SLURM / JOBS, document)
    print(f"{job.folder}: submitted as job {submitted}", file=sys.stderr)
    return {"run": str(job.folder), **document}


def _put(job: Submission, dependency: str | None = None) -> str:
    files.write(job.folder / SLURM / "job.sbatch", job.script.encode(), private=True)
    return slurm.submit(job.script, dependency=dependency)


def _write(path: Path, document: dict[str, Any]) -> None:
    files.write(path, json.dumps(redact(document), indent=1).encode() + b"\n")


def _jobs(folder: Path) -> dict[str, Any]:
    path = folder / SLURM / JOBS
    return read_json(dict[str, Any], path) if path.exists() else {}


def _stop(arguments: argparse.Namespace) -> dict[str, Any]:
    """Have a run save and end, and not be queued again."""
    folder: Path = arguments.run
    document = _jobs(folder)
    if not document:
        raise InputError(f"{folder}: was not submitted with launch/submit.py: there is no {SLURM}/{JOBS}")
    (folder / STOP).touch()
    for child in document["sweep"]:
        (Path(child) / STOP).touch()
    job = document["job"]
    states = slurm.states(job)
    if "PENDING" in states.values():
        slurm.ask("scancel", "--state=PENDING", job)
    for each, state in states.items():
        if state == "RUNNING":
            slurm.ask("scancel", "--batch", "--signal=USR1", each)
            print(f"job {each}: told to save and end", file=sys.stderr)
    return {"run": str(folder), "job": job, "was": sorted(set(states.values()))}


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/NAME")


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    known = status.status(arguments.run)
    print(status.told(known), file=sys.stderr)
    return known.document()


def _logs(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run has said, to standard error like everything that is no result."""
    path = arguments.run / LOG
    if not arguments.follow:
        lines: Iterable[str] = status.tail(path, arguments.lines, rank=arguments.rank)
    else:
        job = _jobs(arguments.run).get("job")
        lines = status.follow(path, lambda: not (job and slurm.states(job)), lines=arguments.lines, rank=arguments.rank)
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    return {"run": str(arguments.run), "log": str(path)}


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="the last N (default 40)")
    parser.add_argument("--rank", type=int, metavar="R", help="of this rank alone")
    parser.add_argument("--follow", action="store_true", help="and what is said until the job ends")


LOOK_AFTER = {
    "status": cli.Subcommand("how it is: state, step, rate, time left, restarts, last error", _add_run, _status),
    "logs": cli.Subcommand("what the job and its ranks say", _add_logs, _logs),
    "stop": cli.Subcommand("have it save and end, and not start again", _add_run, _stop),
}
