"""Every kind of picture packed, indexed and fed on the CPU, and compared with what Pillow makes of it.

python -m tests.decoders [--damaged N]

    corpus ─▶ pack, index ─▶ what they refuse
                          └▶ read, decode ─▶ largest difference from Pillow's picture, in grey levels of 255

Prints a line for each kind, and with --damaged a line for each way in which N pictures of each kind of coding were
damaged: how many were refused, how many fed as Pillow shows them, and how many not.
"""

import argparse
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import cli
from pipeline.config import ImageConfig, SemanticFpnConfig
from pipeline.feed.augment import whole_views
from pipeline.feed.dali import Decoder
from pipeline.shards import images
from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.images import BadImageError
from pipeline.shards.index import ShardSet
from pipeline.shards.index_tars import index_tars
from pipeline.shards.pack import pack
from tests import corpus
from tests.corpus import Kind

Array = npt.NDArray[Any]
Damage = Callable[[bytes, np.random.Generator], bytes]

TOLERANCE = 1.0
"""Grey levels."""


class Result(NamedTuple):
    kind: Kind
    packed: str | None
    """Why packing refuses it."""
    indexed: str | None
    """Why indexing refuses it."""
    difference: float | None
    """Of what is fed, in grey levels."""


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.decoders", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--damaged", type=int, default=0, metavar="N", help="pictures to damage in each way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = try_all(Path(folder))
    print(f"{'kind':46} {'packed':8} {'indexed':8} difference")
    for result in results:
        packed, indexed = ("refused" if reason else "yes" for reason in (result.packed, result.indexed))
        difference = f"{result.difference:.2f}" if result.difference is not None else result.indexed
        print(f"{result.kind.name:46} {packed:8} {indexed:8} {difference}")
    fates = damaged(arguments.damaged)
    for (way, name, fate), count in sorted(fates.items()):
        print(f"{way:20} {name:24} {count:6} {fate}")
    return {
        "kinds": len(results),
        "refused": sum(result.packed is not None for result in results),
        "largest_difference": max(result.difference for result in results if result.difference is not None),
        "wrong": [result.kind.name for result in results if not is_right(result)],
        "damaged": sum(fates.values()),
        "damaged_wrong": sum(count for (_, _, fate), count in fates.items() if fate not in ("refused", "as Pillow")),
    }


def is_right(result: Result) -> bool:
    """Whether a kind is fed as it should be, or refused by name with the option that helps."""
    if result.difference is not None:
        return result.difference <= TOLERANCE and result.packed is None
    return all(reason and ("--quality" in reason or "--bits-stored" in reason) for reason in result[1:3])


def try_all(folder: Path) -> list[Result]:
    """Packs and indexes all kinds below `folder`, and feeds what is taken."""
    kinds = {f"{number:03d}": kind for number, kind in enumerate(corpus.kinds())}
    (folder / "images" / "any").mkdir(parents=True)
    for stem, kind in kinds.items():
        (folder / "images" / "any" / f"{stem}{extension(kind)}").write_bytes(kind.data)
    pack(folder / "images", folder / "packed", skip_bad=True)
    packed = {Path(str(entry["path"])).stem: str(entry["reason"]) for entry in read_skipped(folder / "packed")}
    write_tar(folder / "tars" / "all.tar", kinds)
    _, faults = index_tars(str(folder / "tars"), labels="cls", skip_bad=True)
    indexed = {str(fault.key): fault.reason for fault in faults}
    shards = ShardSet(folder / "tars")
    fed = {shards.key(0, row): shards.read(0, row) for row in range(len(shards))}
    return [
        Result(kind, packed.get(stem), indexed.get(stem), difference(fed[stem], kind.pixels()) if stem in fed else None)
        for stem, kind in kinds.items()
    ]


def extension(kind: Kind) -> str:
    return ".png" if kind.name.startswith("PNG") else ".jpg"


def write_tar(path: Path, kinds: dict[str, Kind]) -> None:
    """Writes a tar whose samples are these, by key, each with the label 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for stem, kind in kinds.items():
            for name, data in ((stem + extension(kind), kind.data), (f"{stem}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def difference(data: bytes, expected: Array) -> float:
    """Returns the largest difference of what is fed of an encoded image from `expected`, [height, width, 3]."""
    return float(np.abs(feed(data, expected.shape[:2]) - expected).max())


def feed(data: bytes, size: tuple[int, ...]) -> Array:
    """Returns what the feed decodes of an image, all of it, [height, width, 3]. Raises RuntimeError where it cannot."""
    views = whole_views(SemanticFpnConfig(), ImageConfig(), np.array([size]))
    batch = [np.frombuffer(data, np.uint8)], views
    decoder = Decoder(
        lambda _: batch,
        batch_size=1,
        interpolation="bicubic",
        device=torch.device("cpu"),
        num_threads=1,
        prefetch=1,
        deterministic=True,
        resizes=False,
    )
    try:
        return decoder.next()[0].numpy().astype(np.float64)
    finally:
        decoder.close()


def damaged(count: int, seed: int = 0) -> Counter[tuple[str, str, str]]:
    """Returns how often each way of damaging each coding came to which end, with `count` pictures of each."""
    rng, fates = np.random.default_rng(seed), Counter()
    for way, damage in WAYS.items():
        for name, data in codings().items():
            fates.update((way, name, fate(damage(data, rng))) for _ in range(count))
    return fates


def fate(data: bytes) -> str:
    """Returns what becomes of an image: refused when it is indexed, or how it is fed then."""
    try:
        images.check(data)
    except BadImageError:
        return "refused"
    try:
        wrong = difference(data, Kind("", data).pixels()) > TOLERANCE
    except RuntimeError:
        return "not decoded"
    return "unlike Pillow" if wrong else "as Pillow"


def codings() -> dict[str, bytes]:
    colour, palette = corpus.picture(3), corpus.picture(1, 4)
    return {
        "JPEG": corpus.jpeg(colour),
        "JPEG progressive": corpus.jpeg(colour, progressive=True),
        "JPEG restart intervals": corpus.jpeg(colour, restart_marker_blocks=2),
        "JPEG CMYK": corpus.jpeg(corpus.picture(4), "CMYK"),
        "PNG": corpus.png(colour, corpus.COLOUR),
        "PNG palette, interlaced": corpus.png(palette, corpus.PALETTE, 4, (b"PLTE", bytes(range(48))), interlaced=True),
    }


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data) // 3, len(data)))]


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


def _blank(data: bytes, rng: np.random.Generator) -> bytes:
    whole = _cut(data, rng)
    return whole + bytes(len(data) - len(whole))


def _drop(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(data) // 3, len(data)))
    return data[:start] + data[start + int(rng.integers(1, 40)) :]


WAYS: dict[str, Damage] = {
    "cut off": _cut,
    "cut off, ended": lambda data, rng: _cut(data, rng) + b"\xff\xd9",
    "one bit flipped": _flip,
    "zeros to the end": _blank,
    "bytes missing": _drop,
}


if __name__ == "__main__":
    cli.run(main)
