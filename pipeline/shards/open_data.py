"""Opens the data sets that a configuration or a command names: the one place that does, so that all cache alike.

path or URL ──layouts: packed on first use──▶ root ──▶ ShardSet ──shards from URLs──▶ data.cache, data.cache_gb
"""

import functools

from pipeline.config import DataConfig
from pipeline.shards import public_datasets
from pipeline.shards.cache import DEFAULT_CACHE, Cache, CacheOptions
from pipeline.shards.index import ShardSet


def open_training(data: DataConfig) -> ShardSet:
    """Returns what a run trains on: one data set, or several end to end. Raises as `open_data` does."""
    return open_data(*data.train_paths, cache=CacheOptions(data.cache, data.cache_gb))


def open_validation(data: DataConfig) -> ShardSet | None:
    """Returns what a run is evaluated on, None where data.val is not set. Raises as `open_data` does."""
    return open_data(data.val, cache=CacheOptions(data.cache, data.cache_gb)) if data.val else None


def open_manifests(data: DataConfig) -> tuple[ShardSet, ShardSet | None]:
    """Returns what a run trains on and is evaluated on, packed, to count samples where the run itself does not go on.

    No cache is made: data.cache may lie on the nodes' own disks.
    """
    return ShardSet(*data.train_paths), ShardSet(data.val) if data.val else None


def open_data(*paths: str, cache: CacheOptions = DEFAULT_CACHE) -> ShardSet:
    """Returns the data sets at `paths`, end to end. One in a public layout is packed on first use.

    Raises InputError for a data set that cannot be read and, where shards are remote, for a cache that cannot be used.
    Packed data sets on a disk need no cache, so a `data.cache` on another node's own disk is no fault there.
    """
    budget_bytes = None if cache.gb is None else int(cache.gb * 1e9)
    make_cache = functools.cache(lambda: Cache.default(cache.folder, budget_bytes))
    shards = ShardSet(*(public_datasets.root_of(path, cache.folder) for path in paths), cache=make_cache)
    if shards.is_remote:
        make_cache()  # now, so that a folder that cannot be used is refused before anything is written
    return shards
