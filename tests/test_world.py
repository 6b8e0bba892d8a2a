"""Where a rank stands, from each launcher's variables, and how its process keeps memory."""

import resource
import subprocess
import sys

import pytest

from pipeline.errors import InputError
from pipeline.world import World, launcher_variables, read_place


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
