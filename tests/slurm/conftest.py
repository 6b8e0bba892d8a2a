import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_config
from tests.slurm.cluster import Cluster, missing, running

STEPS = 120


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes."""
    if packages := missing():
        why = f"no SLURM here: apt-get install {' '.join(packages)}"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on two nodes."""
    folder = tmp_path_factory.mktemp("runs")
    path = write_config(digits, folder)
    tree = yaml.safe_load(path.read_text())
    tree["train"] |= {"length": f"{STEPS} steps", "save_every": "20 steps", "log_every": "5 steps"}
    tree["debug"] = {"trace_samples": True}
    tree["cluster"] = {
        **{"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1},
        **{"time": "30", "max_restarts": 1},
    }
    path.write_text(yaml.safe_dump(tree))
    return path
