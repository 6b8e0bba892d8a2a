"""A tree of JPEG photographs like ImageNet's, made from the few that scikit-learn and scikit-image ship.

    11 photographs ──▶ random window, scaled and mirrored ──▶ OUT/class-C/photo-NNNNN.jpg

What decoding and resizing cost depends on sizes and detail, so these follow ImageNet's: half are about 500 px wide and
375 high, and a file has 25 to 110 kB, 70 on average. The pictures are meant for clocks, not for eyes.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

NUM_CLASSES = 10
QUALITY = 95

# Width, height and share of ImageNet's usual formats; sides vary by a few per cent around them.
_SIZES = [((500, 375), 0.50), ((500, 333), 0.15), ((375, 500), 0.15), ((333, 500), 0.05), ((400, 400), 0.15)]
_FROM_SCIKIT_IMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def write(out: Path, count: int, seed: int = 0) -> None:
    """Write `count` different images below the new folder `out`, which appears whole or not at all."""
    originals = _originals()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        for number in tqdm(range(count), "photographs", unit="img", disable=None):
            folder = partial / f"class-{number % NUM_CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng([seed, number])
            _variant(originals[number % len(originals)], random).save(
                folder / f"photo-{number:05d}.jpg", quality=QUALITY
            )
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _originals() -> list[Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    photographs = [Image.open(folder / name).convert("RGB") for name in _FROM_SCIKIT_IMAGE]
    return photographs + [Image.fromarray(picture) for picture in load_sample_images().images]


def _variant(original: Image.Image, random: np.random.Generator) -> Image.Image:
    sizes, shares = zip(*_SIZES, strict=True)
    size = np.rint(np.array(sizes[random.choice(len(sizes), p=shares)]) * random.uniform(0.94, 1.06, 2))
    # The largest window of that shape, or up to a third less: smaller ones would be blurred by the enlargement.
    window = size * (min(np.array(original.size) / size) * random.uniform(0.67, 1.0))
    corner = random.uniform(0, np.array(original.size) - window)
    width, height = size.astype(int).tolist()
    picture = original.resize(
        (width, height), Image.Resampling.BICUBIC, box=(*corner.tolist(), *(corner + window).tolist())
    )
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else picture
