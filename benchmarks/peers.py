"""The peers' side of benchmarks.feed. Runs in an environment of its own and imports nothing of this project.

    photographs ─▶ convert ─▶ MDS, LitData                (tars and the image folder are used as they are)
    format ─▶ its own loader ─▶ workers: decode, crop, flip, RandAugment ─▶ uint8 batches ─┐
    measure ◀─ float32 batches, labels ◀─ timm's PrefetchLoader: to device, normalise, erase ┘

python benchmarks/peers.py convert|measure JSON

Each peer reads its own format with its own loader, set up as its documentation shows. What they share was
chosen because it proved faster than leaving it out: batches cross from worker to main process as uint8, a quarter of
the bytes of float32, and are normalised there; webdataset and LitData batch in timm's fast_collate.
"""

# pyright: reportMissingImports=false

import dataclasses
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 224
BATCH_SIZE = 64
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
ERASE_PROB = 0.25
INSPECTED = 6  # batches


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement. The same record starts a peer here and our own feed in feed.py."""

    contender: str
    recipe: str  # "plain" or "full"
    data: str  # folder with images/, shards/, mds/ and litdata/
    device: str  # "cpu" or "cuda"
    warmup: int  # batches before the clock starts
    batches: int  # batches measured
    workers: int  # decoding processes
    copies: float  # of the data set that warmup and batches need


def measure(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], job: Job) -> dict[str, Any]:
    """Take batches as fast as they come, and say how long it took.

    Mean and standard deviation are of the first batches' pixels, for comparing what contenders deliver.
    """
    sums = torch.zeros(2)
    for images, labels in itertools.islice(batches, INSPECTED):
        assert images.shape == (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), images.shape
        assert images.dtype == torch.float32, images.dtype
        assert images.device.type == labels.device.type == job.device, images.device
        assert len(labels) == BATCH_SIZE, labels.shape
        sums += torch.stack([images.mean(), images.std()]).cpu() / INSPECTED
    # What was made ahead while the first were inspected must not count.
    for _ in itertools.islice(batches, job.warmup - INSPECTED):
        pass
    if job.device == "cuda":
        torch.cuda.synchronize()
    started, own, busy = time.perf_counter(), own_seconds(), busy_seconds()
    taken = sum(1 for _ in itertools.islice(batches, job.batches))
    if job.device == "cuda":
        torch.cuda.synchronize()
    seconds, own, busy = time.perf_counter() - started, own_seconds() - own, busy_seconds() - busy
    assert taken == job.batches, f"{job.contender} ended after {taken} of {job.batches} batches"
    return {
        "images": taken * BATCH_SIZE,
        "seconds": seconds,
        "cpu_s": own,
        "others_s": max(0.0, busy - own),
        "mean": sums[0].item(),
        "std": sums[1].item(),
    }


def own_seconds() -> float:
    """Time on a core so far of this process and its descendants, all their threads."""
    processes = [os.getpid()]
    for process in processes:  # which grows
        for task in Path(f"/proc/{process}/task").iterdir():
            processes += map(int, (task / "children").read_text().split())
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Time so far that the cores we may use were not idle, whoever used them."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in os.sched_getaffinity(0):
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, fields)
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


# Transforms: a decoded image to a uint8 image, [3, 224, 224].


def timm_options(recipe: str) -> dict[str, Any]:
    augment = RAND_AUGMENT if recipe == "full" else None
    return {"is_training": True, "interpolation": "bicubic", "color_jitter": None, "auto_augment": augment}


def pil_transform(recipe: str) -> Callable[[Any], Any]:
    from timm.data.transforms_factory import create_transform

    # use_prefetcher: uint8 out; normalisation and erasing are PrefetchLoader's.
    transform: Any = create_transform(IMAGE_SIZE, **timm_options(recipe), use_prefetcher=True)
    return transform


def tensor_transform(recipe: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from PIL.Image import Resampling
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[Any] = [
        v2.RandomResizedCrop(IMAGE_SIZE, interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if recipe == "full":
        # timm's, by way of PIL images of 224 px: torchvision's own is another recipe (fewer operations, no noise in
        # the magnitude, nothing bicubic) and on tensors about as slow.
        options = {
            "translate_const": int(IMAGE_SIZE * 0.45),
            "img_mean": (124, 116, 104),
            "interpolation": Resampling.BICUBIC,
        }
        steps += [to_pil, rand_augment_transform(RAND_AUGMENT, options), v2.PILToTensor()]
    return v2.Compose(steps)


def to_pil(image: torch.Tensor) -> Any:
    from PIL import Image

    # v2.ToPILImage lets numpy reorder the bytes, which takes five times as long.
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def decode_pil(encoded: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def decode_torchvision(encoded: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    image: Any = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


# Loaders: a job to an iterable of (uint8 images, labels).


def loader_options(job: Job) -> dict[str, Any]:
    # Pinned memory is what lets a copy to the GPU run beside other work.
    return {"num_workers": job.workers, "pin_memory": job.device == "cuda"}


def webdataset_loader(job: Job, decode: Callable[[bytes], Any], transform: Callable[[Any], Any]) -> Iterable[Any]:
    from timm.data.loader import fast_collate
    from webdataset.compat import WebDataset, WebLoader

    tars = sorted(map(str, Path(job.data, "shards").glob("*.tar")))
    dataset: Any = WebDataset(tars, shardshuffle=len(tars)).shuffle(1000)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(lambda encoded: transform(decode(encoded)), int)
    dataset = dataset.batched(BATCH_SIZE, collation_fn=fast_collate, partial=False).repeat()
    return WebLoader(dataset, batch_size=None, **loader_options(job))


def webdataset_pil(job: Job) -> Iterable[Any]:
    return webdataset_loader(job, decode_pil, pil_transform(job.recipe))


def webdataset_torchvision(job: Job) -> Iterable[Any]:
    return webdataset_loader(job, decode_torchvision, tensor_transform(job.recipe))


def mosaicml_streaming(job: Job) -> Iterable[Any]:
    from streaming import StreamingDataLoader
    from streaming.vision.base import StreamingVisionDataset
    from timm.data.loader import fast_collate

    transform = pil_transform(job.recipe)
    dataset = StreamingVisionDataset(
        local=f"{job.data}/mds",
        batch_size=BATCH_SIZE,
        shuffle=True,
        transform=lambda image: transform(image.convert("RGB")),
        epoch_size=(job.warmup + job.batches + job.workers * 4) * BATCH_SIZE,
    )
    return StreamingDataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=fast_collate, **loader_options(job))


def litdata(job: Job) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from timm.data.loader import fast_collate

    transform = tensor_transform(job.recipe)  # LitData decodes with torchvision
    dataset = StreamingDataset(
        f"{job.data}/litdata",
        shuffle=True,
        subsample=job.copies,
        transform=lambda sample: (transform(sample["image"]), sample["label"]),
    )
    return StreamingDataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=fast_collate, **loader_options(job))


def timm_loader(job: Job) -> Iterator[Any]:
    from timm.data.dataset_factory import create_dataset
    from timm.data.loader import create_loader

    dataset: Any = create_dataset("", f"{job.data}/images")
    loader = create_loader(
        dataset,
        (3, IMAGE_SIZE, IMAGE_SIZE),
        BATCH_SIZE,
        **timm_options(job.recipe),
        re_prob=ERASE_PROB if job.recipe == "full" else 0.0,
        re_mode="pixel",
        **loader_options(job),
        use_multi_epochs_loader=True,
        device=torch.device(job.device),
    )
    while True:
        yield from loader


CONTENDERS: dict[str, Callable[[Job], Iterable[Any]]] = {
    "webdataset-pil": webdataset_pil,
    "webdataset-torchvision": webdataset_torchvision,
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata,
    "timm": timm_loader,
}


def batches_of(job: Job) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    from timm.data.loader import PrefetchLoader

    loader: Any = CONTENDERS[job.contender](job)
    if job.contender == "timm":
        return iter(loader)  # which ends in a PrefetchLoader already
    erase = ERASE_PROB if job.recipe == "full" else 0.0
    return iter(PrefetchLoader(loader, device=torch.device(job.device), re_prob=erase, re_mode="pixel"))


# Conversion: the image folder to the formats that are not read as they are.


def convert(images: Path, out: Path, shard_bytes: int) -> None:
    classes = sorted(folder.name for folder in images.iterdir())
    samples = [(str(path), classes.index(path.parent.name)) for path in sorted(images.glob("*/*.jpg"))]
    write_mds(samples, out / "mds", shard_bytes)
    write_litdata(samples, out / "litdata", shard_bytes)


def write_mds(samples: list[tuple[str, int]], out: Path, shard_bytes: int) -> None:
    from PIL import Image
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"x": "jpeg", "y": "int"}, size_limit=shard_bytes) as writer:
        for path, label in samples:
            with Image.open(path) as image:
                writer.write({"x": image, "y": label})  # a JPEG file's bytes are stored as they are


def write_litdata(samples: list[tuple[str, int]], out: Path, shard_bytes: int) -> None:
    from litdata import optimize

    optimize(read_sample, samples, str(out), chunk_bytes=shard_bytes, num_workers=1)


def read_sample(sample: tuple[str, int]) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(sample[0]), "label": sample[1]}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "torchvision", "pillow", "webdataset", "mosaicml-streaming", "litdata", "timm")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    command, options = sys.argv[1], json.loads(sys.argv[2])
    if command == "convert":
        convert(Path(options["images"]), Path(options["out"]), options["shard_bytes"])
        print(json.dumps(versions()))
    else:
        # For normalising, which is the main process's; workers have one thread each. More would take their cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 4))
        job = Job(**options)
        print(json.dumps(measure(batches_of(job), job)))
