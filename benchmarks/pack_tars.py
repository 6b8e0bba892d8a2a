"""Measures packing tars of others beside webdataset and Pillow that write the same: python -m benchmarks.pack_tars.

    tars of JPEG or WebP ──pack --tars──────────────────────────────────────▶ shards
                         └─WebDataset, Pillow: decode, encode, ShardWriter──▶ shards

Both take one process, in turns. Ours also checks each image for what Pillow accepts and DALI decodes to other colours,
hashes, shuffles across classes, writes the index and waits for the disk. Imports are not timed.
"""

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.shards import foreign_tars
from pipeline.shards.pack import pack
from pipeline.shards.part_names import USUAL

QUALITY = 90


def write_tars(folder: Path, format: str, num_images: int) -> list[str]:
    """Writes four tars of windows of photographs, 500 × 375 as ImageNet's are."""
    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    pattern = str(folder / f"{format}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=-(-num_images // 4), verbose=0) as sink:  # pyright: ignore[reportAttributeAccessIssue]
        for number in range(num_images):
            y, x = rng.integers(0, photos[0].shape[0] - 375), rng.integers(0, photos[0].shape[1] - 500)
            buffer = io.BytesIO()
            Image.fromarray(photos[number % 2][y : y + 375, x : x + 500]).save(buffer, format, quality=QUALITY)
            extension = {"JPEG": "jpg", "WEBP": "webp"}[format]
            sink.write({"__key__": f"{number:06d}", extension: buffer.getvalue(), "cls": number % 2})
    return sorted(map(str, folder.glob(f"{format}-*.tar")))


def pack_with_ours(tars: list[str], out: Path) -> None:
    pack(foreign_tars.find(tars, USUAL, None, 1), out, quality=QUALITY)


def pack_with_webdataset(tars: list[str], out: Path) -> None:
    """Decodes every image, so that a damaged one raises; JPEGs keep their bytes, others become JPEGs."""
    out.mkdir()
    samples: Any = webdataset.WebDataset(tars, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as sink:  # pyright: ignore[reportAttributeAccessIssue]
        for sample in samples:
            data = sample.get("jpg") or sample["webp"]
            image = Image.open(io.BytesIO(data)).convert("RGB")
            if "jpg" not in sample:
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=QUALITY)
                data = buffer.getvalue()
            sink.write({"__key__": sample["__key__"], "jpg": data, "cls": sample["cls"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    contenders: dict[str, Callable[[list[str], Path], None]] = {
        "pack --tars": pack_with_ours,
        "webdataset and Pillow": pack_with_webdataset,
    }
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for format in ("JPEG", "WEBP"):
            tars = write_tars(folder, format, arguments.images)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            # The first round imports and fills caches.
            for number in range(arguments.rounds + 1):
                for name, contender in contenders.items():
                    start = time.perf_counter(), time.process_time()
                    contender(tars, folder / "out")
                    taken = time.perf_counter() - start[0], time.process_time() - start[1]
                    shutil.rmtree(folder / "out")
                    if number:
                        times[name].append(taken)
            result[format] = {name: summarise(arguments.images, found) for name, found in times.items()}
    print(json.dumps({"images": arguments.images, "rounds": arguments.rounds, **result}))


def summarise(num_images: int, times: list[tuple[float, float]]) -> dict[str, float]:
    """Returns images a second by the clock, with the slowest and the fastest round, and by the time on the CPU."""
    rates = [num_images / clock for clock, _ in times]
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "from": round(min(rates), 1),
        "to": round(max(rates), 1),
        "images_per_cpu_second": round(statistics.median(num_images / cpu for _, cpu in times), 1),
    }


if __name__ == "__main__":
    main()
