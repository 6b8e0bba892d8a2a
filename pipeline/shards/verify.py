"""Compare a packed data set with its manifest, byte for byte."""

import hashlib
import zlib
from pathlib import Path

from pipeline.errors import InputError
from pipeline.shards.index import ShardSet


def verify(folder: Path) -> list[str]:
    """What is wrong with the shards of `folder`, one line a fault; empty when all is well.

    Raises InputError when the manifest itself cannot be read or a shard is missing.
    """
    faults = []
    shards = ShardSet(folder)
    for number, shard in enumerate(shards.manifest.shards):
        try:
            records = shards.index(number)
        except InputError as error:
            faults.append(str(error))
            continue
        data = shards.tar(shard.name).read_bytes()
        damaged = [
            shards.key(number, row)
            for row, record in enumerate(records)
            if zlib.crc32(data[record["offset"] : record["offset"] + record["size"]]) != record["crc32"]
        ]
        if damaged or hashlib.sha256(data).hexdigest() != shard.sha256:
            where = f"samples {damaged}" if damaged else "no sample: only headers, labels or padding"
            faults.append(f"{shards.tar(shard.name)}: differs from the manifest; damaged: {where}")
    return faults
