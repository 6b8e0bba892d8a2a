"""Where a rank stands, from each launcher's variables, and how its process keeps memory."""

import os
import resource
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeline import world
from pipeline.errors import ExternalError, InputError
from pipeline.world import World, launcher_variables, read_place
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
def test_a_place_is_read_from_the_launcher(environ: dict[str, str], place: World) -> None:
    assert read_place(launcher_variables(environ)) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "but not LOCAL_RANK: set all of them or none"),
        ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 5 but WORLD_SIZE is 2"),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_place(launcher_variables(environ))


def test_rank_0_says_for_whom_it_waits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "7")
    for place in (World(0, 2), World(0, 4), World(1, 4)):
        with world._waiting_for_others(place):
            pass
    told = "waiting for 1 other rank at 127.0.0.1:7\nwaiting for 3 other ranks at 127.0.0.1:7\n"
    assert capsys.readouterr().err == told


def test_ranks_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    message = rf"^rank 0 of 2 on \S+ cannot meet the others at 127\.0\.0\.1:{port}: Timed out [^\n]+$"
    store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(ExternalError, match=message), world._waiting_for_others(World(0, 2)):
        store("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=1))


def test_ranks_without_a_place_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    message = "WORLD_SIZE 2 but not MASTER_PORT: set all of them"
    with pytest.raises(InputError, match=message), world._waiting_for_others(World(0, 2)):
        pass


def test_a_port_in_use_is_one_line_with_the_option() -> None:
    script = "from launch import command; from pipeline import world; command.run(lambda: world.start() and None)"
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ = {**os.environ, **place, "MASTER_PORT": str(server.getsockname()[1])}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    waits, error = done.stderr.splitlines()
    assert waits.startswith("waiting for 1 other rank at 127.0.0.1:")
    assert error.startswith("error: rank 0 of 2 on ")
    assert error.endswith("the port is in use: choose another one (deepspeed: --master_port, srun: MASTER_PORT)")


def test_freed_memory_is_kept() -> None:
    """Counted in pages that the kernel had to hand out, in a process of its own."""
    script = """
import resource, sys, torch
from pipeline.world import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.zeros(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", script, mode], check=True, capture_output=True, text=True)
        pages[mode] = int(done.stdout)
    assert pages["keep"] < 100 < 5 * (64 << 20) / resource.getpagesize() * 0.9 < pages["leave"]
