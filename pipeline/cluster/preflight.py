"""Checks whether a node can train, before a run starts on it.

    gpus    run_disk  disk  clock  shards ──▶ Check, with one line of text ──launch/doctor.py──▶ JSON
    all_reduce(world)                     ──▶ bandwidth between the ranks

A run would meet these faults (a full disk, another job's processes on a GPU, a clock for which certificates are not
valid) after an hour; here they are found in seconds, together with the node's name. On nodes without GPUs torch is not
imported.
"""

import contextlib
import functools
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import psutil

from pipeline import files, lease, nvidia_driver
from pipeline.cluster import slurm
from pipeline.config import Config, DataConfig, RunConfig
from pipeline.errors import ExternalError, InputError
from pipeline.shards.cache import CacheOptions
from pipeline.shards.index import ANNOTATED_RECORD, CorruptSampleError
from pipeline.shards.own_images import data_paths
from pipeline.shards.public_datasets import is_unpacked

if TYPE_CHECKING:
    import torch

    from pipeline.world import World

MAX_CLOCK_S = 60.0
"""The maximum difference from the sender's clock. Object stores refuse requests that are 5 to 15 minutes off."""
NUM_CHECKPOINTS = 5
"""The number of checkpoints that a run's folder needs room for: by default the three newest, the best one, and one that
is being written."""
RUN_BYTES = 5e9
"""The space needed by a run that has no checkpoints yet: that of five of PVT-Large."""
NODE_BYTES = 1e9
"""The minimum space on a node's own disk, for shards and compiled kernels."""
NVIDIA_SMI_S = 60.0
"""A driver that takes longer to answer does not answer at all."""

P = ParamSpec("P")


@dataclass(frozen=True)
class Check:
    """The result of one check. A node where `ok` is false should not train."""

    name: str
    ok: bool
    told: str
    """One line with the value found and, where the check fails, the rule and the remedy."""
    warning: bool = False
    """Whether something is wrong that training does not need."""

    def as_warning(self) -> "Check":
        """Returns the check with a failure turned into a warning."""
        return replace(self, ok=True, warning=not self.ok)


def make_check(name: str) -> Callable[[Callable[P, str]], Callable[P, Check]]:
    """Returns a decorator that makes a check of a function, which returns what it has found or raises a fault."""

    def decorate(find: Callable[P, str]) -> Callable[P, Check]:
        @functools.wraps(find)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Check:
            try:
                return Check(name, True, _join_lines(find(*args, **kwargs)))
            except (InputError, ExternalError) as error:
                return Check(name, False, _join_lines(str(error)))
            except Exception as error:
                # A node that fails in an unforeseen way must be reported, too.
                return Check(name, False, _join_lines(f"{type(error).__name__}: {error}"))

        return checked

    return decorate


def _join_lines(text: str) -> str:
    return " ".join(text.split())


def check_node(config: Config, sent: float | None = None) -> Iterator[Check]:
    """Yields all checks of a node for a run, one at a time. `sent`: the sender's time, see `clock`."""
    if sent is not None:
        yield clock(sent)
    yield gpus(config.cluster.gpus_per_node)
    if config.cluster.scratch:
        yield disk(os.path.expandvars(config.cluster.scratch))
    yield from check_run(config)


def check_run(config: Config) -> Iterator[Check]:
    """Yields the checks that apply to any machine on which the run may be started."""
    yield run_disk(config.run)
    # Compilers and loaders write temporary files, whether or not shards are kept among them.
    yield disk(os.path.expandvars(config.data.cache or tempfile.gettempdir()))
    training, validation = data_paths(config.data)
    for path in dict.fromkeys([*training, validation]):
        if path is None:
            continue
        yield shards(path, config.data)


@make_check("clock")
def clock(sent: float) -> str:
    """Compares the clock with `sent`, the sender's time (seconds since 1970) just before it started this process."""
    # The time at which this process began, not the present one: importing from a busy file system takes long.
    ahead_s = psutil.Process().create_time() - sent
    if abs(ahead_s) > MAX_CLOCK_S:
        direction = "ahead of" if ahead_s > 0 else "behind"
        raise ExternalError(
            f"{abs(ahead_s):.0f} s {direction} the sender's clock, more than {MAX_CLOCK_S:.0f} s: certificates and "
            "object stores refuse such a node; set its clock (chronyc makestep)"
        )
    return f"{round(ahead_s):+d} s from the sender's, time to start included"


@make_check("disk")
def disk(folder: str | Path) -> str:
    """Checks a folder on the node's own disk."""
    return require_space(folder, NODE_BYTES)


@make_check("disk")
def run_disk(run: RunConfig) -> str:
    """Checks that the folder of all runs supports locks and has space for this run's checkpoints, and that no other
    job uses the run's folder as far as this node can see."""
    space = require_space(run.root, NUM_CHECKPOINTS * _largest_checkpoint_bytes(run.folder) or RUN_BYTES)
    with tempfile.NamedTemporaryFile(dir=run.root, prefix=".preflight-") as probe, files.locked(Path(probe.name)):
        pass
    try:
        lease.find_stale(run.folder, slurm.has_ended)
    except BlockingIOError as error:
        raise ExternalError(f"{error}: wait for it, or choose another run.name") from error
    return space


def _largest_checkpoint_bytes(run: Path) -> int:
    """Returns the size of the largest checkpoint in a run's folder; 0 before the first one."""
    largest = 0
    for folder in run.glob("checkpoints/step-*"):
        # A running job removes old checkpoints.
        with contextlib.suppress(FileNotFoundError):
            size = sum(path.stat().st_size for path in folder.iterdir())
            largest = max(largest, size)
    return largest


def require_space(folder: str | Path, need_bytes: float) -> str:
    """Creates `folder` if it is missing, writes a file to it and checks that `need_bytes` are free; returns a line that
    says how much is free. Raises ExternalError, and InputError for a variable without a value."""
    if "$" in str(folder):
        raise InputError(
            f"{folder}: names a variable that has no value here: set it on the node, or write the path out"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write_and_read(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ExternalError(f"{folder}: cannot be written: {error.strerror}") from error
    if free < need_bytes:
        raise ExternalError(
            f"{folder} has {free / 1e9:,.1f} GB free; {need_bytes / 1e9:,.1f} GB are needed: free some space or name "
            "another folder"
        )
    return f"{folder}: {free / 1e9:,.0f} GB free"


def _write_and_read(folder: str | Path) -> None:
    data = bytes(range(256)) * 4096
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        # So that the bytes are read from the disk and not from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        if file.read() != data:
            raise ExternalError(f"{folder}: the bytes read differ from those written: the disk is damaged")


@make_check("shards")
def shards(path: str, data: DataConfig) -> str:
    """Opens a data set of `data`, reads one sample and compares its checksum.

    One that is not packed only has to exist, because the run packs it. Remote shards are not cached.
    """
    if is_unpacked(path):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder on this node")
        return f"{path}: exists; the run packs it"
    # Imported late: it imports pyarrow, for packing.
    from pipeline.shards.open_data import open_data

    start = time.perf_counter()
    with contextlib.closing(open_data(path, cache=CacheOptions(data.cache, gb=0))) as shard_set:
        try:
            shard_set.read(0, 0)
            if shard_set.record == ANNOTATED_RECORD:
                shard_set.read_annotation(0, 0)
        except CorruptSampleError as error:
            sample = f"{shard_set.url(0)}: sample {shard_set.key(0, 0)}"
            raise ExternalError(f"{sample}: {error}; see launch/shards.py verify") from error
        seconds = time.perf_counter() - start
        return f"{path}: {len(shard_set):,} samples, the first one read in {seconds:.2f} s"


@make_check("gpu")
def gpus(wanted: int | None) -> str:
    """Checks that each GPU of the node is visible, healthy according to the driver, free, and computes correctly.

    `wanted` is the required number: 0 checks nothing; None accepts the number that the driver reports, and GPUs that
    other jobs use.
    """
    if wanted == 0:
        return "none requested"
    states = driver_states()
    if wanted is None and not states:
        return "none"
    import torch

    version = f"driver {next(iter(states.values())).driver}" if states else "no nvidia-smi"
    expected = len(states) if wanted is None else wanted
    visible = torch.cuda.device_count()
    if visible != expected:
        raise ExternalError(
            f"{visible} visible instead of {expected}, {version}, torch {torch.__version__}: ask for them "
            "(cluster.gpus_per_node), or check CUDA_VISIBLE_DEVICES and the driver's version"
        )
    devices = [torch.cuda.get_device_properties(number) for number in range(visible)]
    faults = []
    for number, device in enumerate(devices):
        fault = _find_fault(number, states.get(f"GPU-{device.uuid}"), is_ours=wanted is not None)
        if fault:
            faults.append(f"GPU {number} ({device.name}): {fault}")
    if faults:
        raise ExternalError("; ".join([*faults, version]))
    names = ", ".join(sorted({device.name for device in devices}))
    memory_gib = min(device.total_memory for device in devices) / 2**30
    return f"{visible} × {names}, {memory_gib:.0f} GiB, {version}"


@dataclass(frozen=True)
class DriverState:
    """What the driver reports about a GPU."""

    driver: str
    """The driver's version."""
    ecc_errors: str
    """The number of uncorrected memory errors since the driver was loaded; a text where it is not known."""

    @property
    def fault(self) -> str | None:
        """What is wrong with the GPU, if anything."""
        if self.ecc_errors.isdigit():
            count = int(self.ecc_errors)
            if count == 0:
                return None
            return f"{count} uncorrected ECC errors: reset it (nvidia-smi --gpu-reset)"
        # "[GPU requires reset]", "[Unknown Error]", "[GPU is lost]"; "[N/A]" means that it has no ECC.
        text = self.ecc_errors.lower()
        if any(word in text for word in ("reset", "error", "lost")):
            return f"the driver reports {self.ecc_errors}"
        return None


def driver_states() -> dict[str, DriverState]:
    """Returns the state of each GPU by its UUID, because torch numbers GPUs in another order than nvidia-smi; an empty
    dictionary without nvidia-smi. Raises ExternalError where it fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = "--query-gpu=uuid,driver_version,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_S,
        )
    except subprocess.TimeoutExpired:
        raise ExternalError(f"nvidia-smi: no answer for {NVIDIA_SMI_S:.0f} s: restart the node") from None
    if "No devices were found" in done.stdout + done.stderr:
        return {}
    rows = [re.split(r"\s*,\s*", line.strip()) for line in done.stdout.splitlines()]
    if done.returncode or any(len(row) != 3 for row in rows):
        raise ExternalError(f"nvidia-smi: {done.stdout} {done.stderr} (exit code {done.returncode})")
    return {uuid: DriverState(version, ecc_errors) for uuid, version, ecc_errors in rows}


def _find_fault(number: int, state: DriverState | None, *, is_ours: bool) -> str | None:
    import torch

    if state and state.fault:
        return state.fault
    try:
        free, total = torch.cuda.mem_get_info(number)
        if is_ours and free < nvidia_driver.UNUSED_MEMORY * total:
            gpu = nvidia_driver.pci_bus_id(torch.cuda.get_device_properties(number))
            return f"{nvidia_driver.gpus_in_use(gpu, free, total)}: another job's, which has not ended"
        if not computes_correctly(torch.device("cuda", number)):
            return "computes a wrong matrix product"
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        return f"cannot compute: {first_line}"
    return None


def computes_correctly(device: "torch.device") -> bool:
    """Returns whether a small matrix product is equal to that of the CPU."""
    import torch

    # Integers, whose products and sums are exact in fp32 in any order.
    left = (torch.arange(512 * 512) % 11 - 5).float().reshape(512, 512)
    return torch.equal((left.to(device) @ left.T.to(device)).cpu(), left @ left.T)


def all_reduce(world: "World", mib: int = 64, rounds: int = 5) -> float:
    """Returns the bus bandwidth between the ranks in 10⁹ bytes a second, of the median round: 2 (n - 1) / n · bytes /
    seconds, as nccl-tests defines it. It is 0 in a world of one. Collective.

    Raises ExternalError on every rank where any of them received a wrong sum.
    """
    import torch

    # Integers whose sums stay below 2²⁴ on up to 33,000 ranks: exact in fp32, in whatever order they are added.
    pattern = (torch.arange(mib << 18, device=world.device) % 64).float()
    expected = pattern * sum(rank % 8 + 1 for rank in range(world.size))
    durations = []
    is_wrong = False
    # One round more, because the first one sets up connections.
    for _ in range(1 + rounds):
        tensor = pattern * (world.rank % 8 + 1)
        world.barrier()
        _synchronise(world.device)
        start = time.perf_counter()
        world.sum(tensor)
        _synchronise(world.device)
        durations.append(time.perf_counter() - start)
        is_wrong |= not torch.equal(tensor, expected)
    wrong_ranks = world.gather(torch.tensor([is_wrong], device=world.device)).nonzero()[:, 0].tolist()
    if wrong_ranks:
        raise ExternalError(f"ranks {wrong_ranks} of {world.size} were given wrong sums of what all of them sent")
    seconds = statistics.median(durations[1:])
    return 2 * (world.size - 1) / world.size * pattern.nbytes / seconds / 1e9


def _synchronise(device: "torch.device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
