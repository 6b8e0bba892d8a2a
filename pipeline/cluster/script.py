"""The batch script: the resources that SLURM is asked for, and one command that does everything else.

    ClusterConfig ──render_batch_script──▶ #SBATCH lines
                                           PYTHONPATH, the environment's activation
                                           exec python …/launch/supervise.py …

Because of exec, the supervisor is the process to which SLURM sends the signals for the batch shell.
"""

import re
import shlex
from pathlib import Path

from pipeline.cluster.slurm import parse_seconds
from pipeline.config import ClusterConfig, Config, EnvironmentConfig
from pipeline.errors import InputError

_NOT_IN_PATHS = re.compile(r"[%\\:\x00-\x1f\x7f]")
"""Characters that a run's folder may not contain: sbatch and srun replace what follows a %, sbatch drops a backslash,
PYTHONPATH ends at a colon."""


def render_batch_script(
    cluster: ClusterConfig,
    *,
    name: str,
    log: Path | str,
    code: str,
    command: str,
    array: int | None = None,
    python: str = "python",
    comment: str = "",
    prepare: str = "",
) -> str:
    """Returns a batch script in bash.

    `log`: the file for output, in which SLURM replaces %j and %a. `code`: the folder of the source, in shell syntax.
    `command`: the arguments of launch/supervise.py, in shell syntax. `array`: the number of the array's tasks.
    `prepare`: shell lines before the last one.
    """
    most_nodes = cluster.nodes + cluster.spares
    fewest_nodes = cluster.fewest_nodes
    options = {
        "job-name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "nodes": most_nodes if most_nodes == fewest_nodes else f"{fewest_nodes}-{most_nodes}",
        # Each node gets one task here, because SLURM takes the fewest nodes on which all tasks that it knows of fit.
        # The ranks are tasks of the steps.
        "cpus-per-task": cluster.ranks * cluster.cpus_per_rank,
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": cluster.memory_gb and f"{cluster.memory_gb}G",
        "time": cluster.time,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "array": array and f"0-{array - 1}",
        "signal": f"B:USR1@{cluster.grace_s}",
        "open-mode": "append",
        "output": log,
    }
    # sbatch reads quotes and spaces in these lines as a shell does.
    arguments = [f"--{name}={quoted(value)}" for name, value in options.items() if value is not None]
    # The supervisor decides what happens when a node fails.
    arguments += ["--requeue", "--no-kill"]
    if cluster.exclusive:
        arguments.append("--exclusive")
    arguments += cluster.options
    lines = ["#!/bin/bash"]
    lines += [f"# {line}" for line in comment.splitlines()]
    lines += [f"#SBATCH {argument}" for argument in arguments]
    lines += ["set -euo pipefail", f"export PYTHONPATH={code} PYTHONUNBUFFERED=1"]
    lines += _activation_lines(cluster.environment)
    if prepare:
        lines.append(prepare)
    lines.append(f"exec {python} {code}/launch/supervise.py {command}")
    return "\n".join(lines) + "\n"


def _activation_lines(environment: EnvironmentConfig) -> list[str]:
    if environment.activate is None:
        return []
    # Activation scripts, such as conda's, use variables that are not set and tests that fail.
    report = 'echo "environment.activate: exit status $?, python is $(command -v python)" >&2'
    return ["set +eu", environment.activate, report, "set -eu"]


def render_ready_script(program: str) -> str:
    """Returns the text of slurm/PROGRAM.sbatch, which is submitted with sbatch instead of launch/submit.py."""
    usage = f"""sbatch [OPTIONS OF SBATCH] slurm/{program}.sbatch CONFIG [--set KEY=VALUE …]
From the root of a checkout in which `make setup` was run. Options given to sbatch win over those below."""
    shape = ('"cluster.nodes=$SLURM_JOB_NUM_NODES"', '"cluster.gpus_per_node=${gpus##*:}"')
    return render_batch_script(
        ClusterConfig(),
        name=program,
        log=f"{program}-%j.log",
        code='"$SLURM_SUBMIT_DIR"',
        command=" ".join(['--config "$1"', *(f"--set {each}" for each in shape), '"${@:2}"']),
        comment=usage,
        prepare=(
            'export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"\ngpus=${SLURM_GPUS_PER_NODE:-0}  # perhaps TYPE:NUMBER'
        ),
    )


def check_batch_script(config: Config) -> None:
    """Raises InputError for every mistake that can be known before SLURM is asked."""
    cluster = config.cluster
    folder = str(config.run.folder.resolve())
    if forbidden := _NOT_IN_PATHS.search(folder):
        raise InputError(
            f"run.root {config.run.root!r}: the run's folder would be {folder!r}; under SLURM it may contain no %, "
            f"backslash, colon or control character, but contains {forbidden[0]!r}: choose another folder"
        )
    world_size = cluster.nodes * cluster.ranks
    if world_size > config.data.lanes:
        raise InputError(
            f"cluster.nodes {cluster.nodes} of {cluster.ranks} ranks are {world_size} ranks, but data.lanes is "
            f"{config.data.lanes}, the most that a run can use: {config.describe_more_lanes(world_size)} or take fewer "
            "nodes"
        )
    if cluster.grace_s <= config.train.preempt_deadline_s:
        raise InputError(
            f"cluster.grace_s {cluster.grace_s} is not longer than train.preempt_deadline_s "
            f"{config.train.preempt_deadline_s:g}: the time limit would end a run that is still saving"
        )
    limit_s = parse_seconds(cluster.time)
    if limit_s and limit_s < 2 * cluster.grace_s:
        raise InputError(
            f"cluster.time {cluster.time} is {limit_s} s, of which cluster.grace_s {cluster.grace_s} are kept for "
            "saving: give at least twice that, or the run is stopped before it makes progress"
        )


def quoted(*words: object) -> str:
    """Returns words in shell syntax."""
    return shlex.join(map(str, words))
