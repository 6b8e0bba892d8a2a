from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes."""
    if packages := missing():
        pytest.skip(f"no SLURM here: apt-get install {' '.join(packages)}")
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
