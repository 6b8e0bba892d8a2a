"""Who this process is among the ranks: rank, node, device, and the few collectives the pipeline needs.

Rendezvous is read from the variables that `deepspeed`, `torchrun` or `srun` set; without any, the world is this
one process.
"""

import dataclasses
import datetime
import os
import subprocess
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import InputError

Value = TypeVar("Value")

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class World:
    """One rank's place. Built directly it is a plain value, which is how tests ask "what would rank 3 of 8 do"."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = _CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: Value) -> Value:
        """Rank 0's value on every rank: for small values such as paths and ids."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def start(timeout_s: float = 1800.0) -> World:
    """Join the process group that the launcher describes and pick this rank's device.

    Raises InputError when the launcher's variables contradict each other.
    """
    place = rendezvous(os.environ)
    gpu = torch.cuda.is_available()
    if gpu and place.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {place.local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start as many ranks on a node as it has GPUs"
        )
    device = torch.device("cuda", place.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
    backend = "nccl" if gpu else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if place.size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device if gpu else None)
    return dataclasses.replace(place, device=device)


def stop() -> None:
    """Leave the process group, so that no rank's exit looks like a failure to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rendezvous(environ: Mapping[str, str]) -> World:
    """This process's place according to the launcher's variables.

    Under `srun` the variables that torch.distributed and DeepSpeed read are set from SLURM's.
    """
    if "RANK" not in environ and int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        os.environ.update(_from_slurm(environ))
        environ = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: environ[name] for name in names if name in environ}
    if not found:
        # DeepSpeed looks for these even in a world of one.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        return World()
    if len(found) < len(names):
        missing = ", ".join(sorted(set(names) - set(found)))
        raise InputError(f"the launcher set {found} but not {missing}: set all of them or none")
    rank, size, local_rank = (int(found[name]) for name in names)
    return World(rank, size, local_rank, int(environ.get("LOCAL_WORLD_SIZE", _local_size(environ, size))))


def _local_size(environ: Mapping[str, str], size: int) -> int:
    # The deepspeed launcher names the visible devices of the node, CPU "devices" as well, but no local size.
    devices = environ.get("CUDA_VISIBLE_DEVICES", "")
    return min(size, len(devices.split(","))) if devices else size


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
    )
    # "2(x3),1" means 2 tasks on each of three nodes and 1 on a fourth; threads are shared out by the largest.
    tasks = [int(part.split("(")[0]) for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(",")]
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(tasks)),
        "MASTER_ADDR": environ.get("MASTER_ADDR", hosts.stdout.split()[0]),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000)),
    }
