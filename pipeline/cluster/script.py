"""The batch script: what SLURM is asked for, and one command that does the rest.

Cluster ──render──▶ #SBATCH lines
                    cd, PYTHONPATH, environment
                    exec python …/launch/supervise.py …      now the batch shell, to which SLURM sends its signals
"""

import re
import shlex
from pathlib import Path

from pipeline.cluster.slurm import seconds
from pipeline.config import ClusterConfig, Config, EnvironmentConfig
from pipeline.errors import InputError

_NOT_IN_PATHS = re.compile(r"[%\\:\x00-\x1f\x7f]")
"""Of a run's folder: sbatch and srun replace what follows a %, sbatch drops a backslash, PYTHONPATH ends at a colon."""


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
    """A batch script in bash.

    `log`: where output goes, with SLURM's %j and %a in it if need be. `code`: folder of the source, in shell syntax.
    `command`: what follows `python`, in shell syntax. `array`: number of the array's tasks.
    `prepare`: lines of shell before the last one.
    """
    per_node = cluster.ranks * cluster.cpus_per_rank
    most = cluster.nodes + cluster.spares
    options = {
        "job-name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "nodes": most if most == cluster.fewest_nodes else f"{cluster.fewest_nodes}-{most}",
        # A node's share of the job counts as one task here, because SLURM takes the fewest nodes on which all tasks
        # that it knows of have room. The ranks are tasks of the steps.
        "cpus-per-task": per_node,
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
    given = [f"--{key}={quoted(value)}" for key, value in options.items() if value is not None]
    flags = ["--requeue", "--no-kill", *(["--exclusive"] if cluster.exclusive else [])]
    lines = [
        "#!/bin/bash",
        *(f"# {line}" for line in comment.splitlines()),
        *(f"#SBATCH {option}" for option in (*given, *flags, *cluster.options)),
        "set -euo pipefail",
        f"export PYTHONPATH={code} PYTHONUNBUFFERED=1",
        *_activation(cluster.environment),
        *([prepare] if prepare else []),
        f"exec {python} {code}/launch/supervise.py {command}",
    ]
    return "\n".join(lines) + "\n"


def _activation(environment: EnvironmentConfig) -> list[str]:
    """Lines of the script. Activation scripts, such as conda's, use variables that are not set and tests that fail."""
    if environment.activate is None:
        return []
    report = 'echo "environment.activate: exit status $?, python is $(command -v python)" >&2'
    return ["set +eu", environment.activate, report, "set -eu"]


def ready(program: str) -> str:
    """slurm/PROGRAM.sbatch, for whoever prefers sbatch to launch/submit.py."""
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
    """Raises InputError for what can be known to be wrong before SLURM is asked."""
    cluster = config.cluster
    folder = str(config.run.folder.resolve())
    if found := _NOT_IN_PATHS.search(folder):
        raise InputError(
            f"run.root {config.run.root!r}: the run's folder would be {folder!r}; under SLURM it may contain no %, "
            f"backslash, colon or control character, but contains {found[0]!r}: choose another folder"
        )
    if cluster.nodes * cluster.ranks > config.data.lanes:
        raise InputError(
            f"cluster.nodes {cluster.nodes} of {cluster.ranks} ranks are {cluster.nodes * cluster.ranks} ranks, but "
            f"data.lanes is {config.data.lanes}, the most that a run can use: raise data.lanes or take fewer nodes"
        )
    if cluster.grace_s <= config.train.preempt_deadline_s:
        raise InputError(
            f"cluster.grace_s {cluster.grace_s} is not longer than train.preempt_deadline_s "
            f"{config.train.preempt_deadline_s:g}: the time limit would end a run that is still saving"
        )
    limit_s = seconds(cluster.time)
    if limit_s and limit_s < 2 * cluster.grace_s:
        raise InputError(
            f"cluster.time {cluster.time} is {limit_s} s, of which cluster.grace_s {cluster.grace_s} are kept for "
            "saving: give at least twice that, or the run is stopped before it gets anywhere"
        )


def quoted(*words: object) -> str:
    return shlex.join(map(str, words))
