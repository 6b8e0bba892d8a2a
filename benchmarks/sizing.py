"""How many nodes a pretraining run takes, for how long: a table that is computed, of which nothing is measured.

python -m benchmarks.sizing [--mfu 0.3] [--efficiency 0.95] [--feed 5000] [--nodes 1,2,4,8]

    configs/pretrain/NAME.yaml ─▶ model ─▶ FLOPs of a forward pass, counted ─▶ × 3 a training image
                                        ─▶ ÷ (GPUs × peak × mfu × efficiency ^ doublings) ─▶ images/s, hours, GPU hours

Assumed: the part of the dense bf16 peak that training uses on one node (`--mfu`), and the part of that which each
doubling of the nodes leaves (`--efficiency`). The batch grows with the nodes, 128 images a GPU, and the learning rate
with the batch, 5e-4 × batch / 512 as in the paper: its recipe is one node's, and what larger batches reach has not been
tried. Evaluations, saves and starts cost time on top. Where a GPU would need more images a second than `--feed`, there
is a dagger; the last rows are what such a feed allows, whatever the model.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import cli, network
from pipeline.config import Config, load_config
from pipeline.flops import MFU, PEAK_FLOPS

CONFIGS = tuple(f"configs/pretrain/pvt_{size}_in1k.yaml" for size in ("tiny", "small", "medium", "large"))
SAMPLES, NUM_CLASSES = 1_281_167, 1000
"""Of ImageNet-1K."""
GPUS_PER_NODE = 8
EFFICIENCY, FEED = 0.95, 5000


class Speed(NamedTuple):
    images_per_second: float
    hours: float
    gpu_hours: float

    @classmethod
    def of(cls, images_per_second: float, images: int, gpus: int) -> "Speed":
        hours = images / images_per_second / 3600
        return cls(round(images_per_second, 1), round(hours, 3), round(hours * gpus, 1))

    def cells(self, *, marked: bool = False) -> list[str]:
        rate = f"{self.images_per_second:,.0f}{' †' if marked else ''}"
        return [rate, f"{self.hours:#.2g}", f"{self.gpu_hours:.0f}"]


def main() -> dict[str, Any]:
    arguments = _arguments()
    columns = [f"{device}: images/s | hours | GPU hours" for device in PEAK_FLOPS]
    print(f"| | nodes | GPUs | global batch | `optim.lr` | {' | '.join(columns)} |", file=sys.stderr)
    print("|---" * (5 + 3 * len(columns)) + "|", file=sys.stderr)
    models = {}
    for config in (load_config(Path(path)) for path in CONFIGS):
        per_image = network.training_flops(config.task, config.model, config.image.size, NUM_CLASSES)
        cases = [_case(config, per_image, nodes, arguments) for nodes in arguments.nodes]
        models[config.model.name] = {"gflop_per_image": round(per_image / 1e9, 1), "cases": cases}
    images = num_images(load_config(Path(CONFIGS[0])))
    feed = {n: Speed.of(arguments.feed * n * GPUS_PER_NODE, images, n * GPUS_PER_NODE) for n in arguments.nodes}
    for nodes, speed in feed.items():
        cells = ["any, by its feed", nodes, nodes * GPUS_PER_NODE, "", "", *speed.cells() * len(PEAK_FLOPS)]
        print(f"| {' | '.join(map(str, cells))} |", file=sys.stderr)
    limits = {str(nodes): speed._asdict() for nodes, speed in feed.items()}
    return {"images": images, "computed": models, "by_feed": limits, **vars(arguments), "peak_flops": PEAK_FLOPS}


def _case(config: Config, per_image: int, nodes: int, assumed: argparse.Namespace) -> dict[str, Any]:
    """A row, printed. `per_image`: the FLOPs of a training image."""
    gpus, batch = nodes * GPUS_PER_NODE, nodes * config.train.global_batch_size
    used = gpus * assumed.mfu * assumed.efficiency ** math.log2(nodes)
    speeds = {name: Speed.of(used * peak / per_image, num_images(config), gpus) for name, peak in PEAK_FLOPS.items()}
    cells = [config.model.name, str(nodes), str(gpus), f"{batch:,}", f"{nodes * config.optim.lr:g}"]
    for speed in speeds.values():
        cells += speed.cells(marked=speed.images_per_second > assumed.feed * gpus)
    print(f"| {' | '.join(cells)} |", file=sys.stderr)
    return {"nodes": nodes, "global_batch_size": batch, **{name: speed._asdict() for name, speed in speeds.items()}}


def num_images(config: Config) -> int:
    """That a run trains on. The tail of each epoch is skipped."""
    batch = config.train.global_batch_size
    return batch * config.train.length.steps(steps_per_epoch=SAMPLES // batch, global_batch_size=batch)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description=(__doc__ or "").splitlines()[0])

    def add(name: str, kind: Any, default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default: {default})")

    add("--mfu", _part, MFU, "part of the peak that one node uses")
    add("--efficiency", _part, EFFICIENCY, "part that each doubling of the nodes leaves")
    add("--feed", _count, FEED, "images/s that the feed can give one GPU")
    add("--nodes", _counts, "1,2,4,8", "numbers of nodes")
    return parser.parse_args()


def _part(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 and up to 1 was expected")
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 1 was expected")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


if __name__ == "__main__":
    cli.run(main)
