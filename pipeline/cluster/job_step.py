"""The command lines and the environment of a job's steps: what srun starts on which nodes, and with which Python."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.slurm import ask
from pipeline.config import ClusterConfig

_JOB_SHAPE = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPUS_PER_TASK", "SLURM_TASKS_PER_NODE", "SLURM_NNODES")
"""Variables with which SLURM describes the whole job to the batch script. A step would take them for its own shape."""


def srun_command(cluster: ClusterConfig, nodes: Sequence[str], tasks: int) -> list[str]:
    """Returns the start of a command that runs `tasks` tasks on each of the nodes, with consecutive ranks on a node."""
    granted = int(os.environ.get("SLURM_CPUS_PER_TASK") or cluster.ranks * cluster.cpus_per_rank)
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={tasks * len(nodes)}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={max(1, granted // tasks)}",
        "--distribution=block",
        # SLURM may count the CPUs of an earlier step as used, although its node or its slurmstepd is lost.
        "--overlap",
    ]


def python_command(cluster: ClusterConfig) -> list[str]:
    """Returns the command that starts Python on a node: in the container, from the node's copy, or this one."""
    environment = cluster.environment
    if environment.container:
        gpus = ["--nv"] if cluster.gpus_per_node else []
        return ["apptainer", "exec", *gpus, environment.container, "python"]
    if environment.copy_to_scratch:
        return ["bash", "-c", f'exec "{_environment_copy(cluster)}/bin/python" "$@"', "python"]
    return [sys.executable]


def step_environment(nodes: Sequence[str]) -> dict[str, str]:
    """Returns the environment of a step on the nodes, the first of which has rank 0."""
    kept = {name: value for name, value in os.environ.items() if name not in _JOB_SHAPE}
    # Ranks connect to the address that SLURM knows: the node's name may mean nothing to the resolver.
    about = ask("scontrol", "show", "node", nodes[0], "--oneliner")
    address = re.search(r"\bNodeAddr=(\S+)", about)
    kept["MASTER_ADDR"] = address[1] if address else nodes[0]
    return kept


def copy_environment(cluster: ClusterConfig, nodes: Sequence[str]) -> None:
    """Copies the Python environment to the disk of each node that has no copy yet."""
    # Into a folder of its own first, which is renamed when it is complete: a copy that is cut short is never used.
    script = f"""set -e; to="{_environment_copy(cluster)}"; if [ -d "$to" ]; then exit; fi; mkdir -p "$(dirname "$to")"
            part=$(mktemp -d "$to.XXXXXX"); trap 'rm -rf "$part"' EXIT; cp -a {shlex.quote(sys.prefix)}/. "$part"
            mv -T "$part" "$to" || [ -d "$to" ]"""
    command = [*srun_command(cluster, nodes, 1), "--kill-on-bad-exit=0", "bash", "-c", script]
    # A node on which this fails does not answer to the pre-flight, which reports it.
    subprocess.run(command, env=step_environment(nodes))


def _environment_copy(cluster: ClusterConfig) -> str:
    """Returns the path of the environment's copy, with variables for the node's shell."""
    # An environment that is made anew under the same path gets another copy.
    is_virtual = sys.prefix != sys.base_prefix
    made_ns = (Path(sys.prefix) / "pyvenv.cfg").stat().st_mtime_ns if is_virtual else 0
    key = hashlib.sha256(f"{sys.prefix} {made_ns}".encode()).hexdigest()[:12]
    return f"{cluster.scratch}/environment-{key}"
