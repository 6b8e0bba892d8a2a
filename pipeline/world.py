"""Describes this process among the ranks: rank, world size, device, and the few collectives the pipeline needs.

Rendezvous is read from the variables that `deepspeed`, `torchrun` or `srun` set; without any, the world is this
one process.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import logging
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

log = logging.getLogger(__name__)

Value = TypeVar("Value")

CPU_RANKS = 2
"""The number of ranks on a machine without GPUs: the least that communicate with each other."""
MIN_FREE_MEMORY = 0.1
"""The fraction of a GPU's memory that must be free: with less no run fits."""

_CPU = torch.device("cpu")
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs. The last one is SLURM's."""
_UNTIL_ENDED_S = 10.0
"""How long a rank waits for its launcher to end it when another rank has reported the error."""
_BACKEND = "PVT_TEST_BACKEND"
"""A variable for tests alone: with "gloo" ranks can share a GPU, which NCCL refuses. ZeRO-0 works with it."""


@dataclasses.dataclass(frozen=True)
class World:
    """One rank among all. Built directly it is a plain value, which is how tests ask "what would rank 3 of 8 do"."""

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
        """The cores of its node that this rank uses: those that srun has given its task, or an equal share."""
        cores = len(os.sched_getaffinity(0))
        num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 0)
        if num_tasks != self.size:
            # Another launcher has started the ranks.
            return max(1, cores // self.local_size)
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE") or cores)
        per_task = int(os.environ.get("SLURM_CPUS_PER_TASK") or on_node // self.local_size)
        # srun may have bound the task to its cores already.
        return max(1, min(cores, per_task))

    def tensor(self, values: Sequence[float]) -> torch.Tensor:
        """Returns float64 values on the device, without waiting for the copy."""
        on_gpu = self.device.type == "cuda"
        tensor = torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu)
        return tensor.to(self.device, non_blocking=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Computes the sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns every rank's tensor, [world size, …]."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor)
        return gathered

    def gather_on_first(self, value: Value) -> list[Value]:
        """Returns every rank's value, by rank, on rank 0 and an empty list elsewhere. Values are any Python objects,
        which may differ in size."""
        if self.size == 1:
            return [value]
        if not self.is_first:
            dist.gather_object(value)
            return []
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values)
        return values

    def peak_memory_gb(self) -> float:
        """Returns the most memory used so far, in 10⁹ bytes: allocated on this rank's GPU, or resident in this
        process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_maxrss * 1024 / 1e9

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: Value) -> Value:
        """Returns rank 0's value on every rank. It is meant for small values such as paths and ids."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first_then_all(self, build: Callable[[], Value]) -> Value:
        """Builds something on every rank, but on rank 0 first, so that an error on all ranks is reported once.

        This is a collective. After an InputError on rank 0 the others end without a message. With a world size of 1 the
        error is raised.
        """
        if self.size == 1:
            return build()
        failed = False
        value = cast(Value, None)
        if self.is_first:
            try:
                value = build()
            except InputError as error:
                # Reported before the others know of it: a launcher ends all ranks as soon as one has ended.
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed = True
        if self.from_first(failed):
            os._exit(USAGE)
        return value if self.is_first else build()


def start(timeout_s: float = 1800.0) -> World:
    """Joins the process group that the launcher describes and chooses this rank's device.

    Raises InputError when the launcher's variables contradict each other and for two ranks on one GPU, and
    ExternalError where ranks cannot connect and for GPUs that cannot be used.
    """
    variables = launcher_variables(os.environ)
    world = read_world(variables)
    # torch.distributed and DeepSpeed look for them here, even with a world size of 1.
    os.environ.update(variables)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.num_cores)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = _connect(world, timeout)
    try:
        device = _choose_device(world, store)
    except (InputError, ExternalError) as error:
        _raise_once(error, store)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # DeepSpeed takes it for the number of the device.
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        keep_freed_memory()
    backend = os.environ.get(_BACKEND) or ("nccl" if on_gpu else "gloo")
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if backend == "nccl" and world.size > 1 else None,
    )
    return dataclasses.replace(world, device=device)


def default_ranks() -> int:
    """Returns the ranks that a command starts on this machine by default: one for each GPU, or two on CPUs."""
    return torch.cuda.device_count() or CPU_RANKS


def _connect(world: World, timeout: datetime.timedelta) -> Store:
    """Returns the key-value store that the ranks share before they form a process group."""
    if world.size == 1:
        return HashStore()
    with _waiting_for_others(world):
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    return store


def _raise_once(error: InputError | ExternalError, store: Store) -> NoReturn:
    """Raises the error on one rank of each node. A launcher ends all ranks as soon as one has ended, so the others,
    which have the same error, wait for that."""
    num_failed = store.add(f"error on {os.uname().nodename}", 1)
    if num_failed > 1:
        time.sleep(_UNTIL_ENDED_S)
        os._exit(USAGE if isinstance(error, InputError) else FAILED)
    raise error


@contextlib.contextmanager
def _waiting_for_others(world: World) -> Iterator[None]:
    """Reports on rank 0, at once, whom it waits for: in a shell of `srun --pty` the other tasks have ended."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(f"the launcher set WORLD_SIZE {world.size} but not {', '.join(missing)}: set all of them")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if world.is_first:
        others = "1 other rank" if world.size == 2 else f"{world.size - 1} other ranks"
        log.info(f"waiting for {others} at {where}")
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        # The other lines are a C++ stack trace.
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "the port is in use: choose another one (deepspeed: --master_port, srun: MASTER_PORT)"
        who = f"rank {world.rank} of {world.size} on {os.uname().nodename}"
        raise ExternalError(f"{who} cannot meet the others at {where}: {reason}") from error


def _choose_device(world: World, store: Store) -> torch.device:
    """Returns this rank's device. Raises InputError where another rank has it, ExternalError where it does not work."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return _CPU
    with warnings.catch_warnings():
        # torch's warnings are reported below, in one line.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            require_no_gpu()
            return _CPU
    # A batch system may show each task its own GPU alone.
    num_visible = torch.cuda.device_count()
    device = torch.device("cuda", world.local_rank % num_visible)
    gpu = nvidia_driver.pci_bus_id(torch.cuda.get_device_properties(device))
    if os.environ.get(_BACKEND) != "gloo":
        _require_own(gpu, num_visible, world, store)
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    _require_memory(gpu, free, total)
    return device


def require_no_gpu() -> None:
    """Raises ExternalError on a machine whose GPUs torch cannot use: nobody means to train on its CPUs."""
    driver = nvidia_driver.read_driver()
    if not driver or not driver.num_gpus:
        return
    built_for = torch.version.cuda
    cuda_major = int((built_for or "0").partition(".")[0])
    needed = nvidia_driver.OLDEST.get(cuda_major, 0)
    if built_for is None:
        why = "it was built without CUDA: make setup installs one that was built with it"
    elif int(driver.version.partition(".")[0]) < needed:
        why = f"it was built for CUDA {built_for}, which needs driver {needed} or later: install that"
    else:
        why = f"it says: {_find_cuda_error()}"
    gpus = "1 GPU" if driver.num_gpus == 1 else f"{driver.num_gpus} GPUs"
    raise ExternalError(
        f"{os.uname().nodename} has {gpus} (driver {driver.version}) that torch {torch.__version__} cannot use: {why}; "
        "CUDA_VISIBLE_DEVICES= runs on the CPUs"
    )


def _find_cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "nothing: look at nvidia-smi"


def _require_own(gpu: str, num_visible: int, world: World, store: Store) -> None:
    """Raises InputError on the second rank that chooses a GPU, before NCCL does so in many lines."""
    node = os.uname().nodename
    num_ranks = store.add(f"ranks on {node} {gpu}", 1)
    if num_ranks == 1:
        return
    gpus = "1 GPU" if num_visible == 1 else f"{num_visible} GPUs"
    raise InputError(
        f"rank {world.rank} of {world.size} has no GPU of its own: {node} shows {gpus} to {world.local_size} ranks: "
        f"start one for each GPU (deepspeed --num_gpus {num_visible}, torchrun --nproc-per-node {num_visible}, "
        f"make RANKS={num_visible}; under SLURM cluster.gpus_per_node)"
    )


def _require_memory(gpu: str, free: int, total: int) -> None:
    """Warns of other processes that use a GPU. Raises ExternalError where they leave less than MIN_FREE_MEMORY."""
    if free >= nvidia_driver.UNUSED_MEMORY * total:
        return
    usage = f"GPU {gpu} of {os.uname().nodename}: {nvidia_driver.gpus_in_use(gpu, free, total)}"
    if free < MIN_FREE_MEMORY * total:
        raise ExternalError(f"{usage}: end that, or take another GPU with CUDA_VISIBLE_DEVICES")
    log.warning(usage)


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors for the next ones.

    glibc gives large blocks back to the kernel, which hands them out again page by page, zeroed: up to a quarter of a
    training step on a CPU. PyTorch's allocator for GPUs keeps its memory in any case. Without glibc this does nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        # No blocks that are mapped by themselves, and never a smaller heap.
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def stop() -> None:
    """Leaves the process group, so that no rank's exit looks like a failure to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (under srun also MASTER_ADDR and MASTER_PORT)."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: environ[name] for name in names if environ.get(name)}
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if not variables and num_tasks > 1:
        return _read_slurm_variables(environ)
    if not variables:
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        }
    if missing := sorted(set(names) - set(variables)):
        raise InputError(f"the launcher set {variables} but not {', '.join(missing)}: set all of them or none")
    variables["LOCAL_WORLD_SIZE"] = environ.get("LOCAL_WORLD_SIZE") or _derive_local_size(environ)
    return variables


def _derive_local_size(environ: Mapping[str, str]) -> str:
    # The deepspeed launcher sets no local size. It names a node's visible devices, "devices" of a CPU as well.
    world_size = environ["WORLD_SIZE"]
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    if not devices:
        return world_size
    num_devices = len(devices.split(","))
    return str(min(num_devices, int(world_size)))


def read_world(variables: Mapping[str, str]) -> World:
    """Returns the world that the launcher's variables describe, on the CPU. Raises InputError for an impossible
    rank."""
    world = World(
        int(variables["RANK"]),
        int(variables["WORLD_SIZE"]),
        int(variables["LOCAL_RANK"]),
        int(variables["LOCAL_WORLD_SIZE"]),
    )
    if not 0 <= world.rank < world.size:
        raise InputError(f"RANK is {world.rank} but WORLD_SIZE is {world.size}: ranks count from 0 to WORLD_SIZE - 1")
    return world


def _read_slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]],
        check=True,
        capture_output=True,
        text=True,
    )
    # "2(x3),1" means 2 tasks on each of three nodes and 1 on a fourth; cores are divided by the largest number.
    tasks = environ["SLURM_STEP_TASKS_PER_NODE"].split(",")
    local_sizes = [int(node_tasks.split("(")[0]) for node_tasks in tasks]
    # Each step of a job and each job on a shared node needs a port of its own.
    number = 16 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(local_sizes)),
        "MASTER_ADDR": environ.get("MASTER_ADDR", hosts.stdout.split()[0]),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + number % 20000)),
    }
