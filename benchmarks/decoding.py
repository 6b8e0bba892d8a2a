"""How far DALI's decoding on a GPU is from its decoding on a CPU, and torch's resizing from DALI's.

python -m benchmarks.decoding [--images 128] [--data DIR] [--out DIR]

    photographs, crops drawn by key ─▶ each way to decode and resize them ─▶ grey levels away from DALI's CPU graph

- graph: DALI decodes and resizes, on the CPU; what the others are compared with;
- torch: DALI decodes on the CPU, torch resizes, as the feed does there;
- mixed: DALI decodes and resizes on the GPU, as the feed does there; absent where there is none.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from benchmarks import photographs, report
from pipeline import cli, keys
from pipeline.config import AugmentConfig, ImageConfig
from pipeline.feed import image_ops
from pipeline.feed.augment import Views, training_views
from pipeline.feed.dali import Decoder
from pipeline.keys import Stream

SIZE_PX = 224
CPU = torch.device("cpu")

Encoded = list[npt.NDArray[np.uint8]]


def main() -> dict[str, Any]:
    arguments = _arguments()
    images = arguments.data / "images"
    if not images.exists():
        images.parent.mkdir(parents=True, exist_ok=True)
        photographs.write(images, arguments.photographs)
    encoded = [np.fromfile(path, np.uint8) for path in sorted(images.glob("*/*.jpg"))[: arguments.images]]
    key = keys.key(0, Stream.AUGMENT, np.arange(len(encoded)))
    views = training_views(AugmentConfig(hflip=0), ImageConfig(), SIZE_PX, key, np.array(list(map(_size, encoded))))
    ways = {"torch": by_torch(encoded, views)}
    if torch.cuda.is_available():
        ways["mixed"] = by_dali(encoded, views, torch.device("cuda", 0))
    expected = by_dali(encoded, views, CPU)
    found = {name: difference(shown, expected) for name, shown in ways.items()}
    print("| beside DALI's CPU graph | mean, grey levels of 255 | largest |\n|---|---:|---:|", file=sys.stderr)
    for name, each in found.items():
        print(f"| {name} | {each['mean']:.3f} | {each['largest']} |", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return report.finish("decoding", {"images": len(encoded), "differences": found}, arguments.out, device=device)


def by_dali(encoded: Encoded, views: Views, device: torch.device) -> Tensor:
    """Returns images decoded and resized in DALI's graph, [n, h, w, 3] uint8."""
    images = _decoded(encoded, views, device, resizes=True)
    assert isinstance(images, Tensor)
    return images.cpu()


def by_torch(encoded: Encoded, views: Views) -> Tensor:
    windows = _decoded(encoded, views, CPU, resizes=False)
    interpolation = ImageConfig().interpolation
    sizes = views.resized.tolist()
    return torch.stack(
        [image_ops.resize(window, size, interpolation) for window, size in zip(windows, sizes, strict=True)]
    )


def _decoded(encoded: Encoded, views: Views, device: torch.device, *, resizes: bool) -> Tensor | list[Tensor]:
    decoder = Decoder(
        lambda _: (encoded, views),
        batch_size=len(encoded),
        interpolation=ImageConfig().interpolation,
        device=device,
        num_threads=2,
        prefetch=1,
        deterministic=True,
        resizes=resizes,
    )
    images = decoder.next()
    decoder.close()
    return images


def difference(shown: Tensor, expected: Tensor) -> dict[str, float]:
    """Returns the mean and the largest difference of all pixels, in grey levels."""
    apart = (shown.int() - expected.int()).abs()
    return {"mean": round(apart.double().mean().item(), 4), "largest": int(apart.max())}


def _size(encoded: npt.NDArray[np.uint8]) -> tuple[int, int]:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return image.height, image.width


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=report.count, default=128, help="that are compared (default: 128)")
    parser.add_argument("--photographs", type=report.count, default=1536, help="to be made where there are none")
    parser.add_argument("--data", type=Path, default=Path("runs/data/feed"), help="made when missing: 0.1 GB")
    report.add_out(parser, "decoding")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
