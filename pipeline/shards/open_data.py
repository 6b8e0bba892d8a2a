"""Opens the data sets that a configuration or a command names. All callers use this module, so that all cache alike.

path or URL ──public_datasets: packed on first use──▶ root ──▶ ShardSet ──remote shards──▶ data.cache, data.cache_gb
"""

import functools

from pipeline.config import DataConfig
from pipeline.shards import public_datasets
from pipeline.shards.cache import DEFAULT_CACHE, Cache, CacheOptions
from pipeline.shards.index import ShardSet


def open_training(data: DataConfig) -> ShardSet:
    """Returns a run's training data: one data set, or several end to end. Raises as `open_data` does."""
    cache = CacheOptions(data.cache, data.cache_gb)
    return open_data(*data.train_paths, cache=cache)


def open_validation(data: DataConfig) -> ShardSet | None:
    """Returns a run's validation data, None where data.val is not set. Raises as `open_data` does."""
    if not data.val:
        return None
    cache = CacheOptions(data.cache, data.cache_gb)
    return open_data(data.val, cache=cache)


def open_manifests(data: DataConfig) -> tuple[ShardSet, ShardSet | None]:
    """Returns a run's packed training and validation data, to count samples on a machine that does not train.

    No cache is made: data.cache may lie on the nodes' own disks.
    """
    training = ShardSet(*data.train_paths)
    validation = ShardSet(data.val) if data.val else None
    return training, validation


def open_data(*paths: str, cache: CacheOptions = DEFAULT_CACHE) -> ShardSet:
    """Returns the data sets at `paths`, end to end. A data set in a public layout is packed on first use.

    Raises InputError for a data set that cannot be read and, where shards are remote, for a cache that cannot be used.
    Packed data sets on a disk need no cache, so there a `data.cache` on another node's own disk is no error.
    """
    budget_bytes = None
    if cache.gb is not None:
        budget_bytes = int(cache.gb * 1e9)

    # All data sets share one cache, which is made when it is first needed.
    @functools.cache
    def make_cache() -> Cache:
        return Cache.default(cache.folder, budget_bytes)

    roots = [public_datasets.root_of(path, cache.folder) for path in paths]
    shards = ShardSet(*roots, cache=make_cache)
    # Now, so that a folder that cannot be used is rejected before anything is written.
    if shards.is_remote:
        make_cache()
    return shards
