"""One process that reads random samples of a data set through a cache; see test_store.py.

python -m tests.workers.walk ROOT ORIGINALS CACHE BUDGET_BYTES IN_USE_S SEED READS NAME…

ORIGINALS is the folder of the true files. Prints a line when about to read, and at last a JSON object.
"""

import faulthandler
import hashlib
import json
import random
import sys
from pathlib import Path

from pipeline.shards.store import Blob, Cache, Retry, Store


def main() -> None:
    faulthandler.dump_traceback_later(50, exit=True)
    root, originals, cache, budget_bytes, in_use_s, seed, reads, *names = sys.argv[1:]
    data = {name: Path(originals, name).read_bytes() for name in names}
    blobs = [Blob(name, len(data[name]), hashlib.sha256(data[name]).hexdigest()) for name in names]
    store = Store(
        root,
        Cache(cache, int(budget_bytes), in_use_s=float(in_use_s)),
        retry=Retry(attempts=4, first_wait_s=0.01),
        timeout_s=10,
    )
    draw = random.Random(int(seed))
    print("ready", flush=True)
    wrong = 0
    for _ in range(int(reads)):
        blob = draw.choice(blobs)
        offset = draw.randrange(blob.bytes)
        size = draw.randint(1, min(5000, blob.bytes - offset))
        wrong += store.pread(blob, offset, size) != data[blob.name][offset : offset + size]
    store.close()
    print(json.dumps({"reads": int(reads), "wrong": wrong}))


if __name__ == "__main__":
    main()
