"""Opens the data sets that a configuration or a command names. All callers use this module, so that all cache alike.

path or URL ──public_datasets: packed on first use──▶ root ──▶ ShardSet ──remote shards──▶ data.cache, data.cache_gb
"""

import functools
from pathlib import Path

from pipeline.config import DataConfig, TaskConfig
from pipeline.errors import InputError
from pipeline.shards import own_images, public_datasets
from pipeline.shards.cache import DEFAULT_CACHE, Cache, CacheOptions
from pipeline.shards.index import SampleSource, ShardSet
from pipeline.shards.manifest import CONTENTS, read_classes, read_manifest


def open_training(data: DataConfig) -> ShardSet:
    """Returns a run's training data: one data set, or several end to end. Raises as `open_data` does."""
    paths, _ = own_images.data_paths(data)
    if splits := _pack_splits(data):
        paths = [splits / own_images.TRAINING]
    return open_data(*paths, cache=CacheOptions(data.cache, data.cache_gb))


def open_validation(data: DataConfig) -> ShardSet | None:
    """Returns a run's validation data, None where it has none. Raises as `open_data` does."""
    paths, path = own_images.data_paths(data)
    if splits := _pack_splits(data):
        path = splits / own_images.VALIDATION
    if path is None:
        return None
    if own_images.is_images(path):
        # A class that has no image here is a class all the same.
        classes = read_classes(public_datasets.root_of(paths[0], data.cache))
        path = public_datasets.packed(path, data.cache, classes=classes)
    return open_data(path, cache=CacheOptions(data.cache, data.cache_gb))


def open_manifests(data: DataConfig) -> tuple[ShardSet, ShardSet | None]:
    """Returns a run's packed training and validation data, to count samples on a machine that does not train.

    No cache is made: data.cache may lie on the nodes' own disks. Raises InputError as the run would.
    """
    # Packed data are not split: it is called for its error.
    _pack_splits(data)
    paths, path = own_images.data_paths(data)
    return ShardSet(*paths), ShardSet(path) if path else None


def open_data(*paths: str | Path, cache: CacheOptions = DEFAULT_CACHE) -> ShardSet:
    """Returns the data sets at `paths`, end to end. A data set that is not packed is packed on first use.

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


def require_kind(task: TaskConfig, shards: SampleSource) -> None:
    """Raises InputError for data of another kind than the task's: those without labels, above all."""
    if shards.annotations == task.annotations:
        return
    remedy = "set task, or name other data"
    if shards.annotations == "unlabelled":
        remedy = "pack them with their labels, or name other data; launch/predict.py takes images without"
    raise InputError(
        f"{shards.url(0)}: its data set holds {CONTENTS[shards.annotations]}, but task {task.name} needs "
        f"{CONTENTS[task.annotations]}: {remedy}"
    )


def _pack_splits(data: DataConfig) -> Path | None:
    """Returns the folder of both splits that data.val_fraction makes of data.train, None where it has no effect.

    Raises InputError where it is to split anything else than the images at one path.
    """
    (path, *others), validation = own_images.data_paths(data)
    if validation is not None or data.val_fraction is None:
        return None
    if own_images.is_images(path) and not others:
        return public_datasets.packed(path, data.cache, val_fraction=data.val_fraction)
    # A path that leads nowhere has a message of its own.
    if not public_datasets.is_unpacked(path):
        read_manifest(path)
    raise InputError(
        f"data.val_fraction {data.val_fraction:g} splits images at one path that are not packed; for {path} set "
        "data.val, or pack its images again with --val-fraction"
    )
