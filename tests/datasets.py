"""What data sets hold, as training reads them."""

from pathlib import Path

from pipeline.shards.index import ShardSet


def contents(root: Path) -> dict[str, tuple[str, bytes]]:
    """Returns class and image of every sample by its key, after comparing shards with their manifest."""
    shards = ShardSet(root)
    shards.check()
    return {
        shards.key(number, row): (shards.classes[record["label"]], shards.read(number, row))
        for number in range(len(shards.shard_samples))
        for row, record in enumerate(shards.index(number))
    }
