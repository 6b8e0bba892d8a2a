"""Who this process is among the ranks: rank, node, device, and the few collectives the pipeline needs.

Rendezvous is read from the variables that `deepspeed`, `torchrun` or `srun` set; without any, the world is this
one process.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from pipeline import nvidia_driver
from pipeline.errors import FAILED, USAGE, ExternalError, InputError

Value = TypeVar("Value")

CPU_RANKS = 2
"""The ranks of a machine without GPUs: enough to see what ranks do together."""
MIN_FREE_MEMORY = 0.1
"""The part of a GPU's memory below which a run is refused: nothing fits."""

_CPU = torch.device("cpu")
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs. The last one is SLURM's."""
_UNTIL_ENDED_S = 10.0
"""How long a rank waits for its launcher to end it when another has said why."""
_BACKEND = "PVT_TEST_BACKEND"
"""A variable for tests alone: with "gloo" ranks can share a GPU, which NCCL refuses. ZeRO-0 works with it."""


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

    @property
    def num_cores(self) -> int:
        """This rank's share of its node's: what srun has given its task, or an equal part."""
        cores = len(os.sched_getaffinity(0))
        if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 0) != self.size:  # another launcher has started the ranks
            return max(1, cores // self.local_size)
        step = int(os.environ.get("SLURM_CPUS_ON_NODE") or cores)
        given = int(os.environ.get("SLURM_CPUS_PER_TASK") or step // self.local_size)
        return max(1, min(cores, given))  # srun may have bound the task to its cores already

    def tensor(self, values: Sequence[float]) -> torch.Tensor:
        """float64 on the device, which this process does not wait for."""
        return torch.tensor(values, dtype=torch.float64, pin_memory=self.device.type == "cuda").to(
            self.device, non_blocking=True
        )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [world size, …]."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor)
        return gathered

    def gather_on_first(self, value: Value) -> list[Value]:
        """On rank 0 every rank's value, by rank; elsewhere nothing. For what is no tensor, and may differ in size."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None)
        return values

    def peak_memory_gb(self) -> float:
        """The most so far, in 10⁹ bytes: allocated on this rank's GPU, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

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

    def first_then_all(self, build: Callable[[], Value]) -> Value:
        """Builds something on every rank, but on rank 0 first, so that a mistake of all ranks is reported once.

        Collective. After a mistake of rank 0 the others end without a message. In a world of one it is raised.
        """
        if self.size == 1:
            return build()
        failed, value = False, cast(Value, None)  # until rank 0 has built it
        if self.is_first:
            try:
                value = build()
            except InputError as error:
                # Reported before the others hear of it: a launcher ends all ranks as soon as one has ended.
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed = True
        if self.from_first(failed):
            os._exit(USAGE)
        return value if self.is_first else build()


def start(timeout_s: float = 1800.0) -> World:
    """Join the process group that the launcher describes and pick this rank's device.

    Raises InputError when the launcher's variables contradict each other and for two ranks on one GPU, and
    ExternalError where ranks cannot meet and for GPUs that cannot be used.
    """
    variables = launcher_variables(os.environ)
    place = read_place(variables)
    # torch.distributed and DeepSpeed look for them here, even in a world of one.
    os.environ.update(variables)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(place.num_cores)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = _meet(place, timeout)
    try:
        device = _device(place, store)
    except (InputError, ExternalError) as error:
        _raise_once(error, store)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # which DeepSpeed takes for the number of the device
    else:
        keep_freed_memory()
    backend = os.environ.get(_BACKEND) or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
        device_id=device if backend == "nccl" and place.size > 1 else None,
    )
    return dataclasses.replace(place, device=device)


def default_ranks() -> int:
    """Returns the ranks that a command starts on this machine by default: one for each GPU, or two on CPUs."""
    return torch.cuda.device_count() or CPU_RANKS


def _meet(place: World, timeout: datetime.timedelta) -> Store:
    """Returns what the ranks share before they can send each other anything."""
    if place.size == 1:
        return HashStore()
    with _waiting_for_others(place):
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timeout))
    return store


def _raise_once(error: InputError | ExternalError, store: Store) -> NoReturn:
    """Raises the error on one rank of each node. A launcher ends all ranks as soon as one has ended, so the others,
    which have the same error, wait for that."""
    if store.add(f"error on {os.uname().nodename}", 1) > 1:
        time.sleep(_UNTIL_ENDED_S)
        os._exit(USAGE if isinstance(error, InputError) else FAILED)
    raise error


@contextlib.contextmanager
def _waiting_for_others(place: World) -> Iterator[None]:
    """Rank 0 says at once for whom it waits: in a shell of `srun --pty` it is a task whose others have ended."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(f"the launcher set WORLD_SIZE {place.size} but not {', '.join(missing)}: set all of them")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if place.is_first:
        others = "1 other rank" if place.size == 2 else f"{place.size - 1} other ranks"
        print(f"waiting for {others} at {where}", file=sys.stderr, flush=True)
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "the port is in use: choose another one (deepspeed: --master_port, srun: MASTER_PORT)"
        who = f"rank {place.rank} of {place.size} on {os.uname().nodename}"
        raise ExternalError(f"{who} cannot meet the others at {where}: {reason}") from error


def _device(place: World, store: Store) -> torch.device:
    """Returns this rank's device. Raises InputError where another rank has it, ExternalError where it does not work."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return _CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is reported below, in one line
        if not torch.cuda.is_available():
            require_no_gpu()
            return _CPU
    # A batch system may show each task its own GPU alone.
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    gpu = nvidia_driver.pci_bus_id(torch.cuda.get_device_properties(device))
    if os.environ.get(_BACKEND) != "gloo":
        _require_own(gpu, torch.cuda.device_count(), place, store)
    torch.cuda.set_device(device)
    _require_memory(gpu, *torch.cuda.mem_get_info(device))
    return device


def require_no_gpu() -> None:
    """Raises ExternalError on a machine whose GPUs torch cannot use: nobody means to train on its CPUs."""
    found = nvidia_driver.read_driver()
    if not found or not found.num_gpus:
        return
    built_for = torch.version.cuda
    needed = nvidia_driver.OLDEST.get(int((built_for or "0").partition(".")[0]), 0)
    if built_for is None:
        why = "it was built without CUDA: make setup installs one that was built with it"
    elif int(found.version.partition(".")[0]) < needed:
        why = f"it was built for CUDA {built_for}, which needs driver {needed} or later: install that"
    else:
        why = f"it says: {_why_cuda_fails()}"
    gpus = "1 GPU" if found.num_gpus == 1 else f"{found.num_gpus} GPUs"
    raise ExternalError(
        f"{os.uname().nodename} has {gpus} (driver {found.version}) that torch {torch.__version__} cannot use: {why}; "
        "CUDA_VISIBLE_DEVICES= runs on the CPUs"
    )


def _why_cuda_fails() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "nothing: look at nvidia-smi"


def _require_own(gpu: str, visible: int, place: World, store: Store) -> None:
    """Raises InputError on the second rank that comes to a GPU, before NCCL does so in many lines."""
    if store.add(f"ranks on {os.uname().nodename} {gpu}", 1) == 1:
        return
    has = "1 GPU" if visible == 1 else f"{visible} GPUs"
    raise InputError(
        f"rank {place.rank} of {place.size} has no GPU of its own: {os.uname().nodename} shows {has} to "
        f"{place.local_size} ranks: start one for each GPU (deepspeed --num_gpus {visible}, torchrun --nproc-per-node "
        f"{visible}, make RANKS={visible}; under SLURM cluster.gpus_per_node)"
    )


def _require_memory(gpu: str, free: int, total: int) -> None:
    """Warns of other processes that use a GPU. Raises ExternalError where they leave less than MIN_FREE_MEMORY."""
    if free >= nvidia_driver.UNUSED_MEMORY * total:
        return
    usage = f"GPU {gpu} of {os.uname().nodename}: {nvidia_driver.gpus_in_use(gpu, free, total)}"
    if free < MIN_FREE_MEMORY * total:
        raise ExternalError(f"{usage}: end that, or take another GPU with CUDA_VISIBLE_DEVICES")
    print(f"warning: {usage}", file=sys.stderr, flush=True)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones.

    glibc gives large blocks back to the kernel, which hands them out again page by page, zeroed: up to a quarter of a
    training step on a CPU. PyTorch's allocator for GPUs keeps its memory in any case. Elsewhere than on glibc this does
    nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


def stop() -> None:
    """Leave the process group, so that no rank's exit looks like a failure to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (under srun also MASTER_ADDR and MASTER_PORT)."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: environ[name] for name in names if environ.get(name)}
    if not found and int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _from_slurm(environ)
    if not found:
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if missing := sorted(set(names) - set(found)):
        raise InputError(f"the launcher set {found} but not {', '.join(missing)}: set all of them or none")
    # The deepspeed launcher names a node's visible devices, "devices" of a CPU as well, but no local size.
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    num_devices = str(len(devices.split(","))) if devices else found["WORLD_SIZE"]
    local_size = environ.get("LOCAL_WORLD_SIZE") or min(num_devices, found["WORLD_SIZE"], key=int)
    return {**found, "LOCAL_WORLD_SIZE": local_size}


def read_place(variables: Mapping[str, str]) -> World:
    rank, size, local_rank, local_size = (
        int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank} but WORLD_SIZE is {size}: ranks count from 0 to WORLD_SIZE - 1")
    return World(rank, size, local_rank, local_size)


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
    )
    # "2(x3),1" means 2 tasks on each of three nodes and 1 on a fourth; threads are shared out by the largest.
    tasks = [int(part.split("(")[0]) for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(",")]
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(tasks)),
        "MASTER_ADDR": environ.get("MASTER_ADDR", hosts.stdout.split()[0]),
        # Of their own for the steps of a job that follow each other, and for jobs that share a node.
        "MASTER_PORT": environ.get(
            "MASTER_PORT", str(20000 + (16 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])) % 20000)
        ),
    }
