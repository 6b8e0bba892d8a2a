import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes."""
    if packages := missing():
        why = f"no SLURM here: apt-get install {' '.join(packages)}"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
