"""Where a rank stands, from each launcher's variables, and how its process keeps memory."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline import nvidia_driver, world
from pipeline.errors import USAGE, ExternalError, InputError
from pipeline.nvidia_driver import Driver
from pipeline.world import World, launcher_variables, read_world
from tests.ranks import ROOT, free_port


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, World(0, 1, 0, 1)),
        # torchrun
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),
        # deepspeed, which names a node's devices but not their number
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, World(5, 8, 1, 4)),
        # the shell of a batch script, which is no task of a step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, World(0, 1, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, World(0, 1, 0, 1)),
    ],
)
def test_world_is_read_from_launcher_variables(environ: dict[str, str], place: World) -> None:
    assert read_world(launcher_variables(environ)) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "but not LOCAL_RANK: set all of them or none"),
        ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 5 but WORLD_SIZE is 2"),
    ],
)
def test_contradictory_launcher_variables_are_rejected(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_world(launcher_variables(environ))


def test_rank_0_logs_how_many_ranks_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "7")
    for place in (World(0, 2), World(0, 4), World(1, 4)):
        with world._waiting_for_others(place):
            pass
    told = "waiting for 1 other rank at 127.0.0.1:7\nwaiting for 3 other ranks at 127.0.0.1:7\n"
    assert capsys.readouterr().err == told


def test_missing_ranks_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    message = rf"^rank 0 of 2 on \S+ cannot meet the others at 127\.0\.0\.1:{port}: Timed out [^\n]+$"
    store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(ExternalError, match=message), world._waiting_for_others(World(0, 2)):
        store("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=1))


def test_missing_master_port_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    message = "WORLD_SIZE 2 but not MASTER_PORT: set all of them"
    with pytest.raises(InputError, match=message), world._waiting_for_others(World(0, 2)):
        pass


def test_port_in_use_is_reported_with_the_launcher_option(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(ExternalError, match=r"^rank 0 of 2 on [^\n]+$") as error:
            world._connect(World(0, 2), timedelta(seconds=60))
    told = "the port is in use: choose another one (deepspeed: --master_port, srun: MASTER_PORT)"
    assert str(error.value).endswith(told)
    (waits,) = capfd.readouterr().err.splitlines()
    assert "waiting for 1 other rank at 127.0.0.1:" in waits


Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Makes torch show so many GPUs, of which so much memory is free."""

    def install(count: int, free: float = 1.0) -> None:
        def properties(device: torch.device) -> Any:
            return SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B + (device.index or 0), pci_device_id=0)

        for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**35), 2**35))

    return install


def test_default_ranks_is_one_per_gpu(gpus: Gpus) -> None:
    expected = {0: 2, 1: 1, 8: 8}
    for count, ranks in expected.items():
        gpus(count)
        assert world.default_ranks() == ranks


@pytest.mark.parametrize(("given", "ranks"), [([], "3"), (["RANKS=5"], "5")])
def test_make_targets_start_default_or_given_ranks(given: list[str], ranks: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *default_ranks*) echo 3;; esac\n')
    python.chmod(0o755)
    for target in ("demo", "scenes", "boxes"):
        command = ["make", "--dry-run", target, f"BIN={tmp_path}", *given]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        starts = [line.split() for line in printed.splitlines() if "/deepspeed" in line]
        assert starts
        assert {line[line.index("--num_gpus") + 1] for line in starts} == {ranks}


def hash_store() -> Any:
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def test_each_rank_gets_its_own_gpu(gpus: Gpus) -> None:
    gpus(2)
    store = hash_store()
    assert [world._choose_device(World(rank, 2, rank, 2), store).index for rank in range(2)] == [0, 1]


def test_two_ranks_on_one_gpu_are_rejected(gpus: Gpus) -> None:
    gpus(1)
    store = hash_store()
    assert world._choose_device(World(0, 2, 0, 2), store).index == 0
    message = (
        r"^rank 1 of 2 has no GPU of its own: \S+ shows 1 GPU to 2 ranks: "
        r"start one for each GPU \(deepspeed --num_gpus 1, [^\n]+\)$"
    )
    with pytest.raises(InputError, match=message):
        world._choose_device(World(1, 2, 1, 2), store)


def test_ranks_that_each_see_only_their_own_gpu_are_accepted(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    store = hash_store()
    for rank in range(2):
        own = SimpleNamespace(pci_domain_id=0, pci_bus_id=rank, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, own=own: own)
        assert world._choose_device(World(rank, 2, rank, 2), store).index == 0


def test_same_error_on_several_ranks_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_UNTIL_ENDED_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    store = hash_store()
    with pytest.raises(InputError, match="this"):
        world._raise_once(InputError("this"), store)
    with pytest.raises(SystemExit, match=str(USAGE)):
        world._raise_once(InputError("this"), store)


@pytest.mark.parametrize(
    ("version", "built_for", "message"),
    [
        ("550.54.15", "13.2", r"built for CUDA 13\.2, which needs driver 580 or later: install that"),
        ("580.95.05", None, r"built without CUDA: make setup"),
        ("580.95.05", "13.2", r"it says: \S+"),
    ],
)
def test_gpus_that_torch_cannot_use_are_reported(
    version: str, built_for: str | None, message: str, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(nvidia_driver, "read_driver", lambda: Driver(version, 2))
    whole = rf"^\S+ has 2 GPUs \(driver {version}\) that torch \S+ cannot use: [^\n]*{message}[^\n]*$"
    with pytest.raises(ExternalError, match=whole):
        world._choose_device(World(), hash_store())
    for hidden in ("", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert world._choose_device(World(), hash_store()).type == "cpu"


def test_machine_without_gpus_uses_the_cpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    for found in (None, Driver("580.95.05", 0)):
        monkeypatch.setattr(nvidia_driver, "read_driver", lambda found=found: found)
        assert world._choose_device(World(), hash_store()).type == "cpu"


def test_other_processes_on_a_gpu_are_reported(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(nvidia_driver, "_other_processes", lambda gpu: seen.append(gpu) or [os.getppid(), 2**22 + 1])
    gpus(1, free=0.95)
    world._choose_device(World(), hash_store())
    assert capsys.readouterr().err == ""
    gpus(1, free=0.5)
    world._choose_device(World(), hash_store())
    told = rf"16.0 of 32.0 GiB free: used by pid {os.getppid()} ("
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("GPU 00000000:1b:00.0 of ")
    assert told in line
    assert line.endswith(f"pid {2**22 + 1} (unknown)")
    gpus(1, free=0.05)
    with pytest.raises(ExternalError, match=r"1\.6 of 32\.0 GiB free: used by [^\n]+: end that, or take another GPU"):
        world._choose_device(World(), hash_store())
    assert set(seen) == {"00000000:1b:00.0"}


@pytest.mark.parametrize(
    ("environ", "place", "cores"),
    [
        ({}, World(1, 4, 1, 4), 4),  # torchrun, deepspeed: an equal part
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_STEP_NUM_TASKS": "4"}, World(1, 4, 1, 4), 3),  # srun was told
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_STEP_NUM_TASKS": "8"}, World(1, 8, 1, 4), 2),  # srun was not
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_NUM_TASKS": "4"}, World(1, 4, 1, 4), 16),  # it has bound the task
        # torchrun in a task of srun: the task's cores are shared out
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_STEP_NUM_TASKS": "2"}, World(1, 8, 1, 4), 4),
    ],
)
def test_num_cores_is_the_share_of_a_rank(
    environ: dict[str, str], place: World, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert place.num_cores == cores


def test_keep_freed_memory_avoids_page_faults() -> None:
    """Counted in pages that the kernel had to hand out, in a process of its own."""
    script = """
import resource, torch
from pipeline.world import keep_freed_memory

def count_pages():
    for _ in range(20):
        torch.zeros(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(count_pages())
keep_freed_memory()
print(count_pages())
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < 100 < 5 * (64 << 20) / resource.getpagesize() * 0.9 < usual


def test_local_rank_is_set_to_the_gpu_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes LOCAL_RANK for it: of a GPU that only this task is shown, or that tests share over gloo."""
    asked = dict[str, Any]()
    monkeypatch.setattr(world, "_connect", lambda place, timeout: dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(world, "_choose_device", lambda place, store: torch.device("cuda", 0))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.update(more, backend=backend))
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    here = world.start()
    assert (here.local_rank, os.environ["LOCAL_RANK"]) == (1, "0")
    assert (asked["backend"], asked["device_id"]) == ("nccl", torch.device("cuda", 0))
    monkeypatch.setenv("PVT_TEST_BACKEND", "gloo")
    world.start()
    assert (asked["backend"], asked["device_id"]) == ("gloo", None)
