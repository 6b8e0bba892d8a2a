"""Whether a node can train, looked at before a run starts on it.

    gpus    run_disk  disk  clock  shards ──▶ Check, one line that is told ──launch/doctor.py──▶ JSON
    all_reduce(world)                     ──▶ bandwidth between the ranks

What a run would meet after an hour (a full disk, another job's leftovers on a GPU, a clock that certificates do not
bear) is met here in seconds, with the node's name on it. On nodes without GPUs torch is not imported.
"""

import contextlib
import functools
import os
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
from pipeline.shards.ade20k import is_ade20k
from pipeline.shards.cache import CacheOptions
from pipeline.shards.coco import is_coco
from pipeline.shards.index import CorruptSampleError

if TYPE_CHECKING:
    import torch

    from pipeline.world import World

MAX_CLOCK_S = 60.0
"""A clock further from the sender's is wrong. Object stores refuse requests from 5 to 15 minutes off."""
NUM_CHECKPOINTS = 5
"""That a run's folder needs room for: three newest, the best one, and one on its way, by default."""
RUN_BYTES = 5e9
"""Room for a run that has no checkpoints yet: five of PVT-Large's."""
NODE_BYTES = 1e9
"""Room on a node's own disk, below which neither a shard nor a compiled kernel need be tried."""
NVIDIA_SMI_S = 60.0
"""A driver that takes longer to answer is at its end."""

P = ParamSpec("P")


@dataclass(frozen=True)
class Check:
    """What came of looking at one thing. Without `ok` the node had better not train."""

    name: str
    ok: bool
    told: str
    """One line: what was found, and when that will not do, the rule and the way out."""
    warning: bool = False
    """Something is wrong, but training goes on without it."""

    def as_warning(self) -> "Check":
        """The same about something that training can do without."""
        return replace(self, ok=True, warning=not self.ok)


def check(name: str) -> Callable[[Callable[P, str]], Callable[P, Check]]:
    """Makes a check of a function that returns what it has found, and raises where that will not do."""

    def decorate(look: Callable[P, str]) -> Callable[P, Check]:
        @functools.wraps(look)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Check:
            try:
                return Check(name, True, _line(look(*args, **kwargs)))
            except (InputError, ExternalError) as error:
                return Check(name, False, _line(str(error)))
            except Exception as error:  # a node that fails in a way of its own is no better, and is to be told
                return Check(name, False, _line(f"{type(error).__name__}: {error}"))

        return checked

    return decorate


def _line(text: str) -> str:
    return " ".join(text.split())


def of_node(config: Config, sent: float | None = None) -> Iterator[Check]:
    """All checks of a node that is to take part in a run, one at a time. `sent`: the sender's time, see `clock`."""
    if sent is not None:
        yield clock(sent)
    yield gpus(config.cluster.gpus_per_node)
    if config.cluster.scratch:
        yield disk(os.path.expandvars(config.cluster.scratch))
    yield from of_run(config)


def of_run(config: Config) -> Iterator[Check]:
    """Those that mean something on any machine that the run is started on."""
    yield run_disk(config.run)
    # Compilers and loaders write temporary files, whether or not shards are kept among them.
    yield disk(os.path.expandvars(config.data.cache or tempfile.gettempdir()))
    for path in dict.fromkeys([*config.data.train_paths, *filter(None, [config.data.val])]):
        yield shards(path, config.data)


@check("clock")
def clock(sent: float) -> str:
    """Compares with `sent`, the sender's time (seconds since 1970) just before it started this process."""
    # When this process began: importing from a busy file system takes its time.
    ahead_s = psutil.Process().create_time() - sent
    if abs(ahead_s) > MAX_CLOCK_S:
        raise ExternalError(
            f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the sender's clock, more than "
            f"{MAX_CLOCK_S:.0f} s: certificates and object stores refuse such a node; set its clock (chronyc makestep)"
        )
    return f"{round(ahead_s):+d} s from the sender's, time to start included"


@check("disk")
def disk(folder: str | Path) -> str:
    """A folder on the node's own disk."""
    return usable(folder, NODE_BYTES)


@check("disk")
def run_disk(run: RunConfig) -> str:
    """Checks that the folder of all runs has locks and room for this run's checkpoints, and that no other job is at
    work in it as far as this node sees."""
    told = usable(run.root, NUM_CHECKPOINTS * _checkpoint_bytes(run.folder) or RUN_BYTES)
    with tempfile.NamedTemporaryFile(dir=run.root, prefix=".preflight-") as probe, files.locked(Path(probe.name)):
        pass
    try:
        lease.stale(run.folder, slurm.has_ended)
    except BlockingIOError as error:
        raise ExternalError(f"{error}: wait for it, or give this run a run.name") from error
    return told


def _checkpoint_bytes(run: Path) -> int:
    """The largest checkpoint in a run's folder; 0 before the first."""
    largest = 0
    for folder in run.glob("checkpoints/step-*"):
        with contextlib.suppress(FileNotFoundError):  # a run at work removes old ones
            largest = max(largest, sum(path.stat().st_size for path in folder.iterdir()))
    return largest


def usable(folder: str | Path, need_bytes: float) -> str:
    """Makes `folder` if it is missing, writes there, and sees that it has `need_bytes` free. Raises ExternalError, and
    InputError for a variable without a value."""
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
            f"{folder} has {free / 1e9:,.1f} GB free; {need_bytes / 1e9:,.1f} GB are needed: make room or name another"
        )
    return f"{folder}: {free / 1e9:,.0f} GB free"


def _write_and_read(folder: str | Path) -> None:
    data = bytes(range(256)) * 4096
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to read from the disk, not from memory
        file.seek(0)
        if file.read() != data:
            raise ExternalError(f"{folder}: what was written there is not what is read back; the disk is damaged")


@check("shards")
def shards(path: str, data: DataConfig) -> str:
    """Opens a data set of `data` and reads one sample, whose checksum is compared.

    One in a public layout only has to be there: packing it is for the run. Of remote shards nothing is cached.
    """
    if is_coco(path) or is_ade20k(path):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder on this node")
        return f"{path}: is there, to be packed by the run"
    from pipeline.shards.open_data import open_data  # which can pack, so it imports pyarrow

    start = time.perf_counter()
    with contextlib.closing(open_data(path, cache=CacheOptions(data.cache, gb=0))) as found:
        try:
            found.read(0, 0)
            if found.annotations:
                found.read_annotation(0, 0)
        except CorruptSampleError as error:
            raise ExternalError(
                f"{found.url(0)}: sample {found.key(0, 0)}: {error}; see launch/shards.py verify"
            ) from error
        return f"{path}: {len(found):,} samples, the first one read in {time.perf_counter() - start:.2f} s"


@check("gpu")
def gpus(wanted: int | None) -> str:
    """Each GPU of the node: there, healthy by the driver's account, free, and computing right.

    `wanted` is how many there have to be: 0 looks at nothing; None takes what the driver shows, which others may be
    using as well.
    """
    if wanted == 0:
        return "none wanted"
    states = driver_states()
    if wanted is None and not states:
        return "none"
    import torch

    version = f"driver {next(iter(states.values())).driver}" if states else "no nvidia-smi"
    expected, visible = len(states) if wanted is None else wanted, torch.cuda.device_count()
    if visible != expected:
        raise ExternalError(
            f"{visible} visible instead of {expected}, {version}, torch {torch.__version__}: ask for them "
            "(cluster.gpus_per_node), or look at CUDA_VISIBLE_DEVICES and at the driver's version"
        )
    properties = [torch.cuda.get_device_properties(number) for number in range(visible)]
    faults = [
        f"GPU {number} ({gpu.name}): {fault}"
        for number, gpu in enumerate(properties)
        if (fault := _fault(number, states.get(f"GPU-{gpu.uuid}"), is_ours=wanted is not None))
    ]
    if faults:
        raise ExternalError("; ".join([*faults, version]))
    names = ", ".join(sorted({gpu.name for gpu in properties}))
    return f"{visible} × {names}, {min(gpu.total_memory for gpu in properties) / 2**30:.0f} GiB, {version}"


@dataclass(frozen=True)
class DriverState:
    """What the driver says of a GPU."""

    driver: str
    """Its version."""
    ecc_errors: str
    """Memory errors that could not be corrected, since the driver was loaded; in words where it cannot tell."""

    @property
    def fault(self) -> str | None:
        if self.ecc_errors.isdigit():
            count = int(self.ecc_errors)
            return f"{count} uncorrected ECC errors: reset it (nvidia-smi --gpu-reset)" if count else None
        # "[GPU requires reset]", "[Unknown Error]", "[GPU is lost]"; "[N/A]" says that it has no ECC.
        is_bad = any(word in self.ecc_errors.lower() for word in ("reset", "error", "lost"))
        return f"the driver says {self.ecc_errors}" if is_bad else None


def driver_states() -> dict[str, DriverState]:
    """What nvidia-smi says of each GPU, by UUID, because torch numbers them in another order. None without nvidia-smi;
    raises ExternalError where it fails."""
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
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode or any(len(row) != 3 for row in rows):
        raise ExternalError(f"nvidia-smi: {done.stdout} {done.stderr} (exit code {done.returncode})")
    return {uuid: DriverState(version, ecc) for uuid, version, ecc in rows}


def _fault(number: int, state: DriverState | None, *, is_ours: bool) -> str | None:
    import torch

    if state and state.fault:
        return state.fault
    try:
        free, total = torch.cuda.mem_get_info(number)
        if is_ours and free < nvidia_driver.UNUSED_MEMORY * total:
            gpu = nvidia_driver.pci_bus_id(torch.cuda.get_device_properties(number))
            return f"{nvidia_driver.gpus_in_use(gpu, free, total)}: another job's, which has not ended"
        return None if computes_right(torch.device("cuda", number)) else "computes a wrong matrix product"
    except RuntimeError as error:
        return f"cannot compute: {str(error).partition(chr(10))[0]}"


def computes_right(device: "torch.device") -> bool:
    """Whether a small matrix product comes out as on the CPU. It is one of integers, so it does to the last bit."""
    import torch

    left = (torch.arange(512 * 512) % 11 - 5).float().reshape(512, 512)
    return torch.equal((left.to(device) @ left.T.to(device)).cpu(), left @ left.T)


def all_reduce(world: "World", mib: int = 64, rounds: int = 5) -> float:
    """The bus bandwidth between the ranks in 10⁹ bytes a second: 2 (n - 1) / n · bytes / seconds, as nccl-tests count
    it, of the median round. 0 in a world of one. Collective.

    Raises ExternalError on every rank where any was given a wrong sum.
    """
    import torch

    # Integers whose sums stay below 2²⁴ on up to 33,000 ranks: exact in fp32, in whatever order they are added.
    pattern = (torch.arange(mib << 18, device=world.device) % 64).float()
    expected = pattern * sum(rank % 8 + 1 for rank in range(world.size))
    seconds, wrong = [], False
    for _ in range(1 + rounds):  # the first one sets up connections
        tensor = pattern * (world.rank % 8 + 1)
        world.barrier()
        _finish(world.device)
        start = time.perf_counter()
        world.sum(tensor)
        _finish(world.device)
        seconds.append(time.perf_counter() - start)
        wrong |= not torch.equal(tensor, expected)
    if bad := world.gather(torch.tensor([wrong], device=world.device)).nonzero()[:, 0].tolist():
        raise ExternalError(f"ranks {bad} of {world.size} were given wrong sums of what all of them sent")
    return 2 * (world.size - 1) / world.size * pattern.nbytes / statistics.median(seconds[1:]) / 1e9


def _finish(device: "torch.device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
