"""Submits a run to SLURM; shows its status and log, and stops it.

python launch/submit.py --config FILE [--set KEY=VALUE …] [--sweep KEY=A,B,… …] [--dry-run]
python launch/submit.py status|logs|stop RUN

    FILE ──▶ runs/NAME/slurm/  config.yaml  code-TIME/  job.sbatch ──sbatch──▶ launch/supervise.py on the first node
                               jobs.json  events.jsonl  log

Hand-offs are submitted with the run, each as a job that waits for the run's end. A sweep is an array with one job for
each run.
"""

import argparse
import contextlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import cli, files, yaml_text
from pipeline.cluster import run_log, script, slurm
from pipeline.cluster.script import quoted
from pipeline.cluster.status import read_status
from pipeline.cluster.supervise import LOG, STOP
from pipeline.commands.status_text import format_status
from pipeline.config import Config, HandoffConfig, dump_config, load_config, read_json
from pipeline.errors import ExternalError, InputError
from pipeline.job import handoff
from pipeline.redact import redact
from pipeline.run_folder import SLURM
from pipeline.track.code_version import snapshot
from pipeline.track.sync.record import new_uuid

log = logging.getLogger(__name__)

JOBS = "jobs.json"


class Submission(NamedTuple):
    """A batch script and the configuration of its run."""

    config: Config
    script: str

    @property
    def folder(self) -> Path:
        return self.config.run.folder


def main() -> dict[str, Any]:
    if sys.argv[1:2] and sys.argv[1] in SUBCOMMANDS:
        return cli.choose("launch/submit.py", "Manage a run on SLURM.", SUBCOMMANDS)
    parser = cli.make_parser(
        "launch/submit.py",
        "Submit a run to SLURM.",
        epilog=f"To manage it afterwards: launch/submit.py {'|'.join(SUBCOMMANDS)} RUN",
    )
    cli.add_config(parser)
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="submit a run for each value, or for each combination of values if this is given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and write nothing")
    arguments = parser.parse_args()
    config = _with_absolute_root(cli.read_config(arguments))
    runs: list[tuple[Config, dict[str, Any]]] = [(config, {})]
    if arguments.sweep:
        runs = _expand_sweep(arguments.config, arguments.set, arguments.sweep)
    for run, _ in runs:
        script.check_batch_script(run)
        handoff.check_handoffs(run)
    if arguments.dry_run:
        # Imported late: its imports take seconds.
        from pipeline.job import start_checks

        for run, _ in runs:
            forecast = start_checks.forecast(run, run.cluster.nodes * run.cluster.ranks)
            log.info(f"{run.run.name}: {forecast}")
    code = config.run.folder / SLURM / time.strftime("code-%Y%m%dT%H%M%S")
    main_job = _make_job(config, code, len(runs) if arguments.sweep else None)
    children = [_make_handoff_job(config, entry, code) for entry in config.handoff]
    jobs = [main_job, *children]
    if arguments.dry_run:
        return _show(jobs)
    # All jobs are checked before one is submitted.
    for job in jobs:
        _require_acceptable(job)
    with _lock_run(config.run.folder):
        # The jobs run this copy, whatever happens to the working tree while they wait.
        snapshot(code, diff=config.tracking.log_diff)
        return _submit(main_job, children, runs if arguments.sweep else [])


def _expand_sweep(file: str, overrides: list[str], sweeps: list[str]) -> list[tuple[Config, dict[str, Any]]]:
    """Returns the runs of a sweep, each with the settings that distinguish it."""
    choices: list[list[tuple[str, Any]]] = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = yaml_text.read(f"[{text}]", f"--sweep {sweep!r}")
        if not equals or not values:
            raise InputError(f"--sweep {sweep!r}: expected KEY=A,B,… such as --sweep optim.lr=1e-3,5e-4")
        choices.append([(key, value) for value in values])
    base = load_config(file, overrides)
    if base.handoff:
        raise InputError(f"{file}: handoff with --sweep: remove it, and hand off from the best of the runs")
    runs = []
    for number, chosen in enumerate(itertools.product(*choices)):
        own = [f"{key}={json.dumps(value)}" for key, value in chosen]
        own.append(f"run.name={base.run.name}-{number}")
        run = _with_absolute_root(load_config(file, [*overrides, *own]))
        runs.append((run, dict(chosen)))
    return runs


def _with_absolute_root(config: Config) -> Config:
    """Returns the configuration with an absolute run.root: the jobs may be started in another folder."""
    return handoff.with_root(config, Path(config.run.root).resolve())


def _make_job(config: Config, code: Path, array: int | None = None) -> Submission:
    """Returns the job of a run, or that of a sweep with `array` runs."""
    folder = config.run.folder
    if array:
        log = f"{folder}-%a/{LOG}"
        # The folder alone is quoted, because the shell has to expand the variable.
        command = f'--config {quoted(folder / SLURM)}/task-"$SLURM_ARRAY_TASK_ID".yaml'
    else:
        log = folder / LOG
        command = quoted("--config", folder / SLURM / "config.yaml")
    return Submission(config, _render_script(config, log, code, command, array))


def _make_handoff_job(config: Config, entry: HandoffConfig, code: Path) -> Submission:
    """Returns the job that trains a hand-off of the run in `config`."""
    child = handoff.child_config(entry)
    run = child.run.model_copy(update={"name": handoff.child_name(config, entry), "root": config.run.root})
    child = child.model_copy(update={"run": run, "cluster": handoff.cluster_of(config, entry)})
    script.check_batch_script(child)
    command = quoted("--of", config.run.folder, "--handoff", handoff.entry_key(entry))
    return Submission(child, _render_script(child, child.run.folder / LOG, code, command))


def _render_script(config: Config, log: Path | str, code: Path, command: str, array: int | None = None) -> str:
    # An environment that is activated brings its own Python.
    is_activated = config.cluster.environment.activate is not None
    return script.render_batch_script(
        config.cluster,
        name=config.run.name,
        log=log,
        code=quoted(code),
        command=command,
        array=array,
        python="python" if is_activated else quoted(sys.executable),
    )


def _show(jobs: list[Submission]) -> dict[str, Any]:
    for job in jobs:
        print(redact(job.script))
    try:
        for job in jobs:
            _require_acceptable(job)
    except InputError as error:
        # On a machine without SLURM the scripts are printed all the same.
        if "has no SLURM" not in str(error):
            raise
        log.warning("SLURM was not asked whether it would accept this: there is none on this machine")
    return {"dry_run": True, "run": str(jobs[0].folder), "jobs": len(jobs)}


def _require_acceptable(job: Submission) -> None:
    """Raises InputError for a job that SLURM would not accept."""
    cluster = job.config.cluster
    partitions = slurm.partitions() if cluster.partition else []
    if cluster.partition and cluster.partition not in partitions:
        raise InputError(
            f"cluster.partition {cluster.partition}: there is none of this name, only {', '.join(partitions)}"
        )
    if why := slurm.refusal(job.script):
        cpus = cluster.ranks * cluster.cpus_per_rank
        shape = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs and {cpus} CPUs"
        raise InputError(f"{job.folder}: SLURM would not take the job ({shape}): {why}; see the cluster section")


@contextlib.contextmanager
def _lock_run(folder: Path) -> Iterator[None]:
    """Locks the run's folder while it is submitted. Raises InputError where the run has a job already, or the folder
    cannot be written."""
    with contextlib.ExitStack() as resources:
        try:
            (folder / SLURM).mkdir(parents=True, exist_ok=True)
            resources.enter_context(files.locked(folder / SLURM / ".lock", wait=False))
        except BlockingIOError:
            raise InputError(f"{folder}: is being submitted by somebody else") from None
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written: {error.strerror}: set run.root to a folder that can"
            ) from error
        job = _read_jobs(folder).get("job")
        if job and slurm.states(job):
            raise InputError(
                f"{folder}: is job {job} of SLURM already: `python launch/submit.py status {folder}` shows its state; "
                "stop it, or choose another run.name"
            )
        # A new job continues the run, also where an earlier one was stopped.
        (folder / STOP).unlink(missing_ok=True)
        yield


def _submit(job: Submission, children: list[Submission], sweep: list[tuple[Config, dict[str, Any]]]) -> dict[str, Any]:
    """Writes the files that the jobs need, and puts them into the queue; returns the command's result."""
    # The runs of a sweep are grouped below one parent run in MLflow.
    parent = {"uuid": new_uuid(), "name": job.config.run.name}
    for number, (config, chosen) in enumerate(sweep):
        files.write(job.folder / SLURM / f"task-{number}.yaml", dump_config(config).encode(), private=True)
        (config.run.folder / SLURM).mkdir(parents=True, exist_ok=True)
        _write_json(config.run.folder / SLURM / "sweep.json", {**parent, "set": chosen})
    files.write(job.folder / SLURM / "config.yaml", dump_config(job.config).encode(), private=True)
    job_id = _queue(job)
    document: dict[str, Any] = {
        "job": job_id,
        "handoffs": {},
        "sweep": [str(config.run.folder) for config, _ in sweep],
    }
    for number, (config, _) in enumerate(sweep):
        _write_single_job(config.run.folder, f"{job_id}_{number}")
    try:
        for child in children:
            (child.folder / SLURM).mkdir(parents=True, exist_ok=True)
            (child.folder / STOP).unlink(missing_ok=True)
            child_id = _queue(child, dependency=f"afterok:{job_id}")
            document["handoffs"][str(child.folder)] = child_id
            _write_single_job(child.folder, child_id)
    except (ExternalError, OSError):
        # All of them or none.
        slurm.ask("scancel", job_id, *document["handoffs"].values())
        raise
    _write_json(job.folder / SLURM / JOBS, document)
    log.info(f"{job.folder}: submitted as job {job_id}")
    return {"run": str(job.folder), **document}


def _queue(job: Submission, dependency: str | None = None) -> str:
    files.write(job.folder / SLURM / "job.sbatch", job.script.encode(), private=True)
    return slurm.submit(job.script, dependency=dependency)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    files.write(path, json.dumps(redact(document), indent=1).encode() + b"\n")


def _write_single_job(folder: Path, job_id: str) -> None:
    _write_json(folder / SLURM / JOBS, {"job": job_id, "handoffs": {}, "sweep": []})


def _read_jobs(folder: Path) -> dict[str, Any]:
    path = folder / SLURM / JOBS
    return read_json(dict[str, Any], path) if path.exists() else {}


def _stop(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes a run save and end, and not be queued again."""
    folder: Path = arguments.run
    document = _read_jobs(folder)
    if not document:
        raise InputError(f"{folder}: was not submitted with launch/submit.py: there is no {SLURM}/{JOBS}")
    # Before the signals: a supervisor that stops looks for these files.
    (folder / STOP).touch()
    for child in document["sweep"]:
        (Path(child) / STOP).touch()
    job = document["job"]
    states = slurm.states(job)
    if "PENDING" in states.values():
        slurm.ask("scancel", "--state=PENDING", job)
    for job_id, state in states.items():
        if state == "RUNNING":
            slurm.ask("scancel", "--batch", "--signal=USR1", job_id)
            log.info(f"job {job_id}: asked to save and end")
    return {"run": str(folder), "job": job, "was": sorted(set(states.values()))}


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/NAME")


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    status = read_status(arguments.run)
    cli.show(format_status(status))
    return status.document()


def _logs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the run's log to standard error, because standard output is for the result."""
    path = arguments.run / LOG
    if arguments.follow:
        job = _read_jobs(arguments.run).get("job")

        def has_ended() -> bool:
            return not (job and slurm.states(job))

        lines: Iterable[str] = run_log.follow(path, has_ended, lines=arguments.lines, rank=arguments.rank)
    else:
        lines = run_log.tail(path, arguments.lines, rank=arguments.rank)
    for line in lines:
        cli.show(line)
    return {"run": str(arguments.run), "log": str(path)}


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="number of last lines (default 40)")
    parser.add_argument("--rank", type=int, metavar="R", help="only the lines of this rank")
    parser.add_argument("--follow", action="store_true", help="also print new lines until the job ends")


SUBCOMMANDS = {
    "status": cli.Subcommand("show state, step, speed, time left, restarts and last error", _add_run, _status),
    "logs": cli.Subcommand("print the log of the job and its ranks", _add_logs, _logs),
    "stop": cli.Subcommand("make the run save and end, and not start again", _add_run, _stop),
}
