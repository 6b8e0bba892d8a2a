"""The batch scripts, without a cluster."""

import subprocess

import pytest

from pipeline.cluster import script
from pipeline.cluster.slurm import seconds
from pipeline.config import Cluster
from tests.ranks import ROOT


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_ready_scripts_are_of_the_same_template(program: str) -> None:
    """Written by `python -c "from pipeline.cluster.script import ready; print(ready('pretrain'), end='')"`."""
    text = (ROOT / f"slurm/{program}.sbatch").read_text()
    assert text == script.ready(program)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_job_asks_for_whole_shares_of_nodes() -> None:
    cluster = Cluster(nodes=4, min_nodes=2, spares=1, cpus_per_rank=12, partition="gpu", time="2-00:00:00")
    lines = script.render(cluster, name="big", log="log", code="/code", command="--config x").splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    wanted = "--nodes=2-5 --cpus-per-task=96 --gpus-per-node=8 --partition=gpu --time=2-00:00:00 --signal=B:USR1@180"
    assert set(wanted.split()) | {"--requeue", "--no-kill"} <= set(options)
    assert lines[0] == "#!/bin/bash"
    assert lines[-1] == "exec python /code/launch/supervise.py --config x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("90", 90 * 60), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-12:30", 131400)],
        *[("2-00:00:01", 172801), ("UNLIMITED", None), ("NOT_SET", None)],
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int | None) -> None:
    assert seconds(text) == expected
