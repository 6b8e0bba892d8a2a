"""Augmentation against what it stands in for: pixels against Pillow and timm on real photographs, and the draws of
its parameters against timm's and torchvision's by statistical tests."""

import io
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import skimage
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from pipeline import keys
from pipeline.config import AugmentConfig, ImageConfig, RandAugment
from pipeline.feed import image_ops, transfer
from pipeline.feed.augment import Views, evaluation_views, training_views
from pipeline.feed.dali import Decoder
from pipeline.feed.random_ops import RAND_AUGMENT, Op
from pipeline.keys import Stream

FILL = (124, 116, 104)
SIZE = 160

TIMM = {
    Op.AUTO_CONTRAST: auto_augment.auto_contrast,
    Op.EQUALIZE: auto_augment.equalize,
    Op.INVERT: auto_augment.invert,
    Op.ROTATE: auto_augment.rotate,
    Op.POSTERIZE: auto_augment.posterize,
    Op.SOLARIZE: auto_augment.solarize,
    Op.SOLARIZE_ADD: auto_augment.solarize_add,
    Op.COLOR: auto_augment.color,
    Op.CONTRAST: auto_augment.contrast,
    Op.BRIGHTNESS: auto_augment.brightness,
    Op.SHARPNESS: auto_augment.sharpness,
    Op.SHEAR_X: auto_augment.shear_x,
    Op.SHEAR_Y: auto_augment.shear_y,
    Op.TRANSLATE_X: auto_augment.translate_x_rel,
    Op.TRANSLATE_Y: auto_augment.translate_y_rel,
}
FACTORS, SHEARS, SHIFTS = [0.1, 0.55, 1, 1.45, 1.9], [-0.3, 0, 0.27], [-0.45, 0, 0.123]
ARGUMENTS: dict[Op, list[float]] = {
    Op.AUTO_CONTRAST: [0],
    Op.EQUALIZE: [0],
    Op.INVERT: [0],
    Op.ROTATE: [-30, -11.3, 0, 27],
    Op.POSTERIZE: [1, 2, 4, 8],
    Op.SOLARIZE: [0, 25, 128, 256],
    Op.SOLARIZE_ADD: [0, 40, 110],
    Op.COLOR: FACTORS,
    Op.CONTRAST: FACTORS,
    Op.BRIGHTNESS: FACTORS,
    Op.SHARPNESS: FACTORS,
    Op.SHEAR_X: SHEARS,
    Op.SHEAR_Y: SHEARS,
    Op.TRANSLATE_X: SHIFTS,
    Op.TRANSLATE_Y: SHIFTS,
}
LEVELED = set(RAND_AUGMENT) - {Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT}
WHOLE = {Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD}
GREY_LEVELS = 2.0  # mean absolute difference allowed, of 255


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """scikit-learn's two (CC BY 2.0) and those that lie inside scikit-image's wheel."""
    images = [Image.fromarray(array) for array in load_sample_images().images]
    for path in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if path.suffix in (".png", ".jpg", ".jpeg"):
            with Image.open(path) as image:
                if image.mode == "RGB":
                    image.thumbnail((640, 640))
                    images.append(image.copy())
    assert len(images) >= 4
    return images


@pytest.fixture(scope="module")
def squares(photographs: list[Image.Image]) -> list[Image.Image]:
    return [image.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for image in photographs]


def tensors(images: list[Image.Image]) -> torch.Tensor:
    """[n, 3, H, W]"""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).contiguous()


def difference(ours: torch.Tensor | np.ndarray, reference: Image.Image) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).mean())


@pytest.mark.gpu
@pytest.mark.parametrize("op", RAND_AUGMENT, ids=lambda op: op.name)
def test_rand_augment_ops_match_timm(op: Op, squares: list[Image.Image], device: torch.device) -> None:
    worst = 0.0
    for argument in ARGUMENTS[op]:
        args = torch.full((len(squares),), float(argument)).to(device), torch.arange(len(squares)).to(device)
        fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
        results = image_ops.apply(tensors(squares).to(device), np.full(len(squares), op), *args, fill).cpu()
        value = [int(argument) if op in WHOLE else argument] if op in LEVELED else []
        for image, result in zip(squares, results, strict=True):
            expected = TIMM[op](image, *value, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
            worst = max(worst, difference(result.permute(1, 2, 0), expected))
    print(f"\n{op.name}: mean absolute difference from timm at most {worst:.3f} grey levels of 255")
    assert worst <= (GREY_LEVELS if op is Op.ROTATE else 0.2)


IMAGE = ImageConfig()
PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, quality=95, **options)
    return buffer.getvalue()


def show(encoded: list[bytes], views: Views, interpolation: str = "bicubic", *, in_graph: bool) -> np.ndarray:
    """What becomes of images up to the flip, [n, S, S, 3] uint8: resized by the DALI graph, as on a GPU, or by torch,
    as on a CPU."""
    arrays = [np.frombuffer(data, np.uint8) for data in encoded]
    decoder = Decoder(
        lambda _: (arrays, views),
        batch_size=len(arrays),
        interpolation=interpolation,
        device=torch.device("cpu"),
        num_threads=2,
        prefetch=1,
        deterministic=True,
        resizes=in_graph,
    )
    images = decoder.next()
    if isinstance(images, list):
        crops = zip(images, views.resized.tolist(), views.corner.tolist(), strict=True)
        images = torch.stack(
            [
                image_ops.resize(image, resized, interpolation)[
                    top : top + views.canvas[0], left : left + views.canvas[1]
                ]
                for image, resized, (top, left) in crops
            ]
        )
    images = images.numpy()
    decoder.close()
    return np.where(views.flip[:, None, None, None], images[:, :, ::-1], images)


def sizes(pictures: list[Image.Image]) -> np.ndarray:
    return np.array([(picture.height, picture.width) for picture in pictures])


def draw(config: AugmentConfig, hw: np.ndarray, size: int = 224) -> Views:
    return training_views(config, IMAGE, size, keys.key(0, Stream.AUGMENT, np.arange(len(hw))), hw)


@pytest.mark.parametrize("in_graph", [False, True], ids=["torch", "DALI"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_training_views_match_pillow(
    format: str, interpolation: str, in_graph: bool, photographs: list[Image.Image]
) -> None:
    encoded = [data for image in photographs for data in 3 * [encode(image, format)]]
    pictures = [picture for data in encoded[::3] for picture in 3 * [Image.open(io.BytesIO(data)).convert("RGB")]]
    views = draw(AugmentConfig(), sizes(pictures), 96)
    assert 0 < views.flip.sum() < len(encoded)
    worst = 0.0
    for n, shown in enumerate(show(encoded, views, interpolation, in_graph=in_graph)):
        (top, left), (height, width) = views.anchor[n], views.shape[n]
        crop = pictures[n].crop((left, top, left + width, top + height)).resize((96, 96), PILLOW[interpolation])
        expected = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flip[n] else crop
        worst = max(worst, difference(shown, expected))
    print(f"\nresized crop, {interpolation}, {format}: at most {worst:.3f} grey levels of 255")
    assert worst < GREY_LEVELS / 2


@pytest.mark.parametrize("in_graph", [False, True], ids=["torch", "DALI"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_views_match_torchvision(crop_pct: float, in_graph: bool, photographs: list[Image.Image]) -> None:
    encoded = [encode(image) for image in photographs]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    views = evaluation_views(ImageConfig(crop_pct=crop_pct), 112, sizes(pictures))
    resize = transforms.Resize(int(112 / crop_pct), transforms.InterpolationMode.BICUBIC)
    reference = transforms.Compose([resize, transforms.CenterCrop(112)])
    for shown, picture in zip(show(encoded, views, in_graph=in_graph), pictures, strict=True):
        assert difference(shown, reference(picture)) < GREY_LEVELS / 2


@pytest.mark.parametrize("in_graph", [False, True], ids=["torch", "DALI"])
def test_plain_crop_is_window_of_resized_image(in_graph: bool, photographs: list[Image.Image]) -> None:
    encoded = [encode(image) for image in photographs]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    views = draw(AugmentConfig(crop="plain", hflip=0), sizes(pictures), 112)
    assert len({tuple(corner) for corner in views.corner.tolist()}) > 2
    for n, shown in enumerate(show(encoded, views, in_graph=in_graph)):
        top, left = views.corner[n].tolist()
        assert min(top, left) == 0
        resized = transforms.Resize(112, transforms.InterpolationMode.BICUBIC)(pictures[n])
        assert difference(shown, resized.crop((left, top, left + 112, top + 112))) < GREY_LEVELS / 2


def test_center_crop_matches_evaluation_view(photographs: list[Image.Image]) -> None:
    hw = sizes(photographs)
    ours, theirs = draw(AugmentConfig(crop="center", hflip=0), hw), evaluation_views(IMAGE, 224, hw)
    for name in ("anchor", "shape", "resized", "corner", "flip"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()


def test_exif_orientation_is_ignored(photographs: list[Image.Image]) -> None:
    picture = photographs[0]
    exif = picture.getexif()
    exif[0x0112] = 6
    views = evaluation_views(ImageConfig(crop_pct=1.0), 64, sizes([picture]))
    turned, plain = encode(picture, exif=exif), encode(picture)
    assert (show([turned], views, in_graph=False) == show([plain], views, in_graph=False)).all()


def test_finisher_applies_steps_in_timm_order(squares: list[Image.Image]) -> None:
    # Flip, two operations, normalise, erase: composed here from the reference functions.
    ops = np.array([[Op.ROTATE, Op.EQUALIZE], [Op.SOLARIZE, Op.SHEAR_Y]])
    args = np.array([[20.0, 0], [100, 0.2]], np.float32)
    boxes = np.array([[10, 40, 20, 90], [0, 0, 0, 0]])
    nought, full, flip = np.zeros((2, 2), np.int32), np.full((2, 2), SIZE, np.int32), np.array([True, False])
    nowhere = np.zeros((2, 0, 2), np.int32)
    views = Views((SIZE, SIZE), nought, nought, nought, nought, full, flip, ops, args, boxes, np.zeros(2), nowhere)
    noise = torch.randn(1 << 16)
    batch, single = torch.empty(2, 3, SIZE, SIZE), torch.empty(2, 3, SIZE, SIZE)
    finisher = image_ops.Finisher(IMAGE, torch.device("cpu"), noise)
    images = tensors(squares[:2]).permute(0, 2, 3, 1)
    finisher.finish(images, views, batch)
    for n in range(2):
        finisher.finish(images[n : n + 1], views[n : n + 1], single[n : n + 1])
    assert torch.equal(batch, single)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGE.mean, IMAGE.std)])
    for n, image in enumerate(squares[:2]):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flip[n] else image
        for op, argument in zip(ops[:, n], args[:, n], strict=True):
            value = [int(argument) if op in WHOLE else float(argument)] if op in LEVELED else []
            image = TIMM[Op(op)](image, *value, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        expected: Any = reference(image)
        if n == 0:
            expected[:, 10:40, 20:90] = noise[: 3 * 30 * 70].view(3, 30, 70)
        assert (batch[n] - expected).abs().mean() < GREY_LEVELS / 255 / 0.22


def test_finishing_batch_matches_finishing_single_images(squares: list[Image.Image]) -> None:
    # With operations that several images share and others that none has, in no order.
    n, rng = 24, np.random.default_rng(0)
    ops = rng.choice([Op.EQUALIZE, Op.ROTATE, Op.SOLARIZE, Op.IDENTITY], (2, n))
    args = rng.uniform(0, 100, (2, n)).astype(np.float32)
    nought, full, nowhere = np.zeros((n, 2), np.int32), np.full((n, 2), SIZE, np.int32), np.zeros((n, 0, 2), np.int32)
    boxes, flip = np.zeros((n, 4), np.int64), rng.random(n) < 0.5
    views = Views((SIZE, SIZE), nought, nought, nought, nought, full, flip, ops, args, boxes, np.zeros(n), nowhere)
    images = tensors([squares[i % len(squares)] for i in range(n)]).permute(0, 2, 3, 1)
    batch, single = torch.empty(n, 3, SIZE, SIZE), torch.empty(n, 3, SIZE, SIZE)
    finisher = image_ops.Finisher(IMAGE, torch.device("cpu"))
    finisher.finish(images, views, batch)
    for i in range(n):
        finisher.finish(images[i : i + 1], views[i : i + 1], single[i : i + 1])
    assert torch.equal(batch, single)


def test_gpu_histogram_matches_bincount() -> None:
    bins = torch.randint(0, 700, (5000,), dtype=torch.int32)
    assert torch.equal(image_ops._count_by_scattering(bins, minlength=768), torch.bincount(bins, minlength=768))


def test_transfer_pack_and_unpack_round_trip() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.random(3) < 0.5,
        rng.random((2, 3)).astype(np.float32),
        np.zeros((0, 4), np.float32),
        rng.integers(0, 255, (5, 1), np.uint8),
        rng.integers(-5, 5, (4, 4)).T,
        np.array(7.5),
    ]
    packed = transfer.pack(arrays, pin=False)
    for array, tensor in zip(arrays, transfer.unpack(arrays, packed), strict=True):
        assert tensor.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_erasing_without_noise_fills_with_zero(squares: list[Image.Image]) -> None:
    nought, full, nowhere = np.zeros((1, 2), np.int32), np.full((1, 2), SIZE, np.int32), np.zeros((1, 0, 2), np.int32)
    box, none = np.array([[5, 9, 3, 30]]), np.zeros((0, 1), np.int64)
    still = np.array([False])
    views = Views((SIZE, SIZE), nought, nought, nought, nought, full, still, none, none, box, np.zeros(1), nowhere)
    out = torch.empty(1, 3, SIZE, SIZE)
    image_ops.Finisher(IMAGE, torch.device("cpu")).finish(tensors(squares[:1]).permute(0, 2, 3, 1), views, out)
    assert (out[0, :, 5:9, 3:30] == 0).all()
    assert (out[0, :, 9:, :] != 0).any()


def test_crop_window_distribution_matches_torchvision() -> None:
    count, height, width = 4000, 375, 500
    ours = draw(AugmentConfig(), np.full((count, 2), (height, width)))
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    window = np.concatenate([ours.anchor, ours.shape], axis=1)
    assert (ours.anchor + ours.shape <= [height, width]).all()
    for column in range(4):
        assert same_distribution(window[:, column], theirs[:, column])
    assert abs(ours.flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)


def test_too_narrow_image_gets_central_crop_window() -> None:
    views = draw(AugmentConfig(crop_scale=(0.9, 1.0)), np.full((4, 2), (10, 400)))
    assert (views.shape == [10, 13]).all()
    assert (views.anchor == [0, 193]).all()


def same_distribution(ours: Any, theirs: Any) -> bool:
    test: Any = scipy.stats.ks_2samp(ours, theirs)
    return test.pvalue > 1e-4


def same_frequencies(counts: Any) -> bool:
    test: Any = scipy.stats.chi2_contingency(counts)
    return test.pvalue > 1e-4


def timm_draws(policy: str, images: int) -> list[tuple[Op, float]]:
    """The operations that timm applies, with their arguments, as its pixel functions are called with them."""
    calls: list[tuple[Op, float]] = []
    arity = {op: op in LEVELED for op in RAND_AUGMENT}

    def record(op: Op) -> Any:
        return lambda image, *values, **_: (calls.append((op, float(values[0]) if arity[op] else 0.0)), image)[1]

    by_function = {function: op for op, function in TIMM.items()}
    recorded = {name: record(by_function[f]) for name, f in auto_augment.NAME_TO_OP.items() if f in by_function}
    with mock.patch.object(auto_augment, "NAME_TO_OP", recorded):
        transform = auto_augment.rand_augment_transform(policy, {})
    random.seed(0)
    np.random.seed(0)
    for _ in range(images):
        transform(Image.new("RGB", (8, 8)))
    return calls


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m6-mstd101-inc1", "rand-m12-mmax15-mstd1"]
)
def test_rand_augment_distribution_matches_timm(policy: str) -> None:
    images = 6000
    theirs = timm_draws(policy, images)
    views = draw(AugmentConfig(rand_augment=RandAugment.parse(policy)), np.full((images, 2), 32))
    ops, args = views.ops.ravel(), views.args.ravel()
    counts = np.array([[np.sum(ops == op), sum(o is op for o, _ in theirs)] for op in RAND_AUGMENT])
    assert same_frequencies(counts)
    applied = [len(theirs) / views.ops.size, np.mean(ops != Op.IDENTITY)]
    assert abs(applied[0] - applied[1]) < 4 * np.sqrt(2 * 0.25 / views.ops.size)
    for op in LEVELED:
        expected = np.array([value for o, value in theirs if o is op], np.float32)
        # timm passes bits below 0 on where the magnitude may exceed 10; both make the image black.
        expected = np.clip(expected, 0, None) if op is Op.POSTERIZE else expected
        assert same_distribution(args[ops == op], expected), op.name


def test_posterize_to_zero_bits_is_black(squares: list[Image.Image]) -> None:
    nought = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, 1)
    black = image_ops.apply(tensors(squares[:1]), np.array([Op.POSTERIZE]), *nought)
    assert not black.any()


def test_color_jitter_distribution_matches_torchvision() -> None:
    count = 3000
    views = draw(AugmentConfig(color_jitter=0.4), np.full((count, 2), 32))
    torch.manual_seed(0)
    jitter: Any = transforms.ColorJitter(0.4, 0.4, 0.4)
    # Its parameters: an order of 0 brightness, 1 contrast, 2 saturation, 3 hue, and the factors.
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(count)]
    named = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]
    orders = [[named[i] for i in order.tolist() if i < 3] for order, *_ in theirs]
    for layer in range(3):
        ours = [np.sum(views.ops[layer] == op) for op in named]
        expected = [sum(order[layer] is op for order in orders) for op in named]
        assert same_frequencies([ours, expected])
    for number, op in enumerate(named):
        assert same_distribution(views.args[views.ops == op], [factors[number] for _, *factors in theirs])


def test_random_erasing_distribution_matches_timm() -> None:
    count, size = 4000, 64
    views = draw(AugmentConfig(erase_prob=0.5), np.full((count, 2), 64), size)
    erasing = RandomErasing(probability=0.5, mode="const", device="cpu")
    random.seed(0)
    boxes = []
    for _ in range(count):
        image = erasing(torch.ones(1, size, size))
        rows, columns = (torch.nonzero((image[0] == 0).any(dim=dim)).flatten() for dim in (1, 0))
        if len(rows):
            boxes.append([rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1])
    ours = views.erase[views.erase.any(axis=1)]
    assert abs(len(ours) - len(boxes)) < 4 * np.sqrt(2 * count * 0.25)
    for column, theirs in enumerate(np.array(boxes).T):
        assert same_distribution(ours[:, column], theirs)
