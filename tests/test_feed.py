"""The feed against PIL, torchvision and timm; then the same pixels, targets and masks on every world."""

import io
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.mixup import Mixup
from torchvision import transforms

from pipeline import config, keys
from pipeline.config import Config
from pipeline.feed import augment, mix
from pipeline.feed.dali import Decoder
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.keys import Stream
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.shards.store import CorruptSampleError
from pipeline.world import World

Make = Callable[..., Config]
GREY_LEVELS = 2.0  # mean absolute difference allowed, of 255


def photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, one as it is and one cut to a portrait format."""
    china, flower = load_sample_images().images
    return [china, flower[:, 100:300]]


def encode(image: np.ndarray, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, quality=95)
    return buffer.getvalue()


def decode(encoded: list[bytes], views: augment.Views, size: int) -> np.ndarray:
    """What the DALI graph makes of images, in grey levels, [n, S, S, 3]."""
    arrays = [np.frombuffer(data, np.uint8) for data in encoded]
    decoder = Decoder(
        lambda _: (arrays, views.anchor, views.shape, views.roi_start, views.roi_end, views.flip),
        batch_size=len(arrays),
        image=config.Image(size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
        device=torch.device("cpu"),
        num_threads=2,
        prefetch=1,
        deterministic=True,
    )
    images = decoder.next()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    return (255 * (images.permute(0, 2, 3, 1) * std + mean)).numpy()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_training_views_show_what_pil_shows(format: str) -> None:
    encoded = [encode(image, format) for image in photographs()] * 8
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    views = augment.training_views(
        config.Augment(),
        keys.key(0, Stream.AUGMENT, np.arange(len(encoded))),
        np.array([picture.height for picture in pictures]),
        np.array([picture.width for picture in pictures]),
    )
    assert 0 < views.flip.sum() < len(encoded)
    shown = decode(encoded, views, 96)
    for n, picture in enumerate(pictures):
        (top, left), (height, width) = views.anchor[n], views.shape[n]
        crop = picture.crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((96, 96), Image.Resampling.BICUBIC), float)
        expected = expected[:, ::-1] if views.flip[n] else expected
        assert np.abs(shown[n] - expected).mean() < GREY_LEVELS / 4, n


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_views_show_what_torchvision_shows(crop_pct: float) -> None:
    encoded = [encode(image, "JPEG") for image in photographs()]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    views = augment.evaluation_views(
        112, crop_pct, np.array([p.height for p in pictures]), np.array([p.width for p in pictures])
    )
    shown = decode(encoded, views, 112)
    reference = transforms.Compose(
        [
            transforms.Resize(int(112 / crop_pct), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(112),
        ]
    )
    for n, picture in enumerate(pictures):
        assert np.abs(shown[n] - np.asarray(reference(picture), float)).mean() < GREY_LEVELS / 4, n


def test_exif_orientation_is_ignored_as_by_torchvision() -> None:
    picture = Image.fromarray(photographs()[0])
    exif = picture.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, exif=exif)
    views = augment.evaluation_views(64, 1.0, np.array([picture.height]), np.array([picture.width]))
    plain = decode([encode(photographs()[0], "JPEG")], views, 64)
    assert np.abs(decode([buffer.getvalue()], views, 64) - plain).max() < 1e-3


def test_crop_windows_are_distributed_as_torchvisions() -> None:
    count, height, width = 4000, 375, 500
    ours = augment.training_views(
        config.Augment(),
        keys.key(0, Stream.AUGMENT, np.arange(count)),
        np.full(count, height),
        np.full(count, width),
    )
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    window = np.concatenate([ours.anchor, ours.shape], axis=1)
    assert (ours.anchor + ours.shape <= [height, width]).all()
    for column in range(4):
        _, p_value = scipy.stats.ks_2samp(window[:, column], theirs[:, column])
        assert p_value > 1e-3  # pyright: ignore[reportOperatorIssue] - SciPy's annotations lag behind
    assert abs(ours.flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)


def test_an_image_too_narrow_for_any_window_gets_the_central_one() -> None:
    views = augment.training_views(
        config.Augment(crop_scale=(0.9, 1.0)),
        keys.key(0, Stream.AUGMENT, np.arange(4)),
        np.full(4, 10),
        np.full(4, 400),
    )
    assert (views.shape == [10, 13]).all()
    assert (views.anchor == [0, 193]).all()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_a_lane_is_timms_mixup_of_a_batch(mixup: float, cutmix: float) -> None:
    settings = config.Mix(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=0.9, label_smoothing=0.1)
    images, labels = torch.randn(2, 3, 24, 32), torch.tensor([3, 7])
    kinds = set()
    for lane in range(60):
        key = keys.key(5, Stream.MIX, 0, np.array([lane]))
        blends = mix.draw(settings, key, 24, 32)[np.array([0, 0])]
        # timm draws from numpy's global generator; let it draw from this lane's.
        rng = keys.generator(key[0])
        with mock.patch.multiple("numpy.random", rand=rng.random, beta=rng.beta, randint=rng.integers):
            theirs = Mixup(mixup, cutmix, prob=0.9, label_smoothing=0.1, num_classes=10)
            expected, targets = theirs(images.clone(), labels)
        torch.testing.assert_close(mix.mix_images(images, blends), expected)
        torch.testing.assert_close(mix.mix_targets(mix.soft_targets(labels, 10, 0.1), blends), targets)
        kinds.add("cutmix" if blends.box.any() else "mixup" if blends.label_weight[0] < 1 else "none")
    assert kinds >= {"none"} | ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


Consumed = dict[tuple[int, int], tuple[int, bytes, bytes, bytes]]


def consume(settings: Config, world_size: int, first_step: int, steps: int) -> Consumed:
    """(step, position) of every weighing sample to its id, pixels, target and drop-path mask."""
    shards = ShardSet(settings.data.train)
    consumed: Consumed = {}
    for rank in range(world_size):
        feed = TrainFeed(
            settings, shards, World(rank, world_size), first_step=first_step, drop_path_rates=[0.0, 0.1, 0.2, 0.3, 0.4]
        )
        for step in range(first_step, first_step + steps):
            for batch in feed.next():
                assert batch.drop_path is not None
                for n in np.flatnonzero(batch.weights.numpy()):
                    where = step, int(batch.samples.position[n])
                    assert where not in consumed
                    tensors = batch.images[n], batch.targets[n], batch.drop_path[:, n]
                    pixels, target, mask = (tensor.numpy().tobytes() for tensor in tensors)
                    consumed[where] = int(batch.samples.id[n]), pixels, target, mask
        feed.close()
    return consumed


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Consumed:
    from tests.conftest import write_config

    settings = config.load(write_config(digits, tmp_path_factory.mktemp("reference")))
    consumed = consume(settings, 1, 28, 3)  # an epoch has 29 steps, so this crosses into the next
    assert len(consumed) == 3 * 48
    return consumed


@pytest.mark.parametrize(("world_size", "micro"), [(1, 10), (2, None), (3, 4), (4, 8), (5, None), (7, 6), (12, 2)])
def test_every_world_is_fed_the_same(settings: Make, reference: Consumed, world_size: int, micro: int | None) -> None:
    other = settings(f"train.micro_batch_size={'null' if micro is None else micro}", "data.prefetch=3")
    assert consume(other, world_size, 28, 3) == reference


def test_seeking_gives_what_walking_gives(settings: Make, reference: Consumed) -> None:
    assert consume(settings(), 2, 30, 1) == {where: what for where, what in reference.items() if where[0] == 30}


def test_pixels_belong_to_their_ids(tmp_path: Path, settings: Make) -> None:
    # Each image is one flat grey that says its number, so that the tensors themselves tell which sample they are.
    for number in range(60):
        path = tmp_path / "images" / "grey" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (4 * number,) * 3).save(path)
    pack(tmp_path / "images", tmp_path / "packed", samples_per_shard=7)
    shards = ShardSet(tmp_path / "packed")
    plain = settings("mix={}", "train.global_batch_size=12")
    feed = TrainFeed(plain, shards, World())
    for _ in range(5):
        (batch,) = feed.next()
        numbers = ((batch.images * 0.5 + 0.5) * 255 / 4).round().mean(dim=(1, 2, 3))
        pairs = zip(batch.samples.shard, batch.samples.row, strict=True)
        assert numbers.tolist() == [int(shards.key(shard, row).split("/")[1]) for shard, row in pairs]
    feed.close()


def test_drop_path_masks_keep_at_their_rates(settings: Make) -> None:
    rates = [0.0, 0.1, 0.5]
    feed = TrainFeed(settings(), ShardSet(settings().data.train), World(), drop_path_rates=rates)
    plans = [feed.plan(number).drop_path for number in range(100)]
    masks = np.concatenate([mask for mask in plans if mask is not None], axis=1)
    assert masks.shape == (3, 100 * 48)
    feed.close()
    assert (masks[0] == 1).all()
    for mask, rate in zip(masks, rates, strict=True):
        assert set(np.unique(mask).tolist()) <= {0.0, np.float32(1 / (1 - rate)).item()}
        assert abs(mask.mean() - 1) < 4 * np.sqrt(rate / (1 - rate) / mask.size) + 1e-6
    assert abs(np.corrcoef(masks[1], masks[2])[0, 1]) < 0.06


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_takes_every_sample_once(digits: Path, world_size: int) -> None:
    shards, image = ShardSet(digits / "val"), config.Image(size=32)
    taken: list[int] = []
    for rank in range(world_size):
        batches = list(EvalFeed(shards, World(rank, world_size), image, batch_size=50))
        assert len(batches) == -(-len(shards) // (50 * world_size))
        for batch in batches:
            taken += batch.samples.id[batch.weights.numpy() > 0].tolist()
    assert sorted(taken) == list(range(len(shards)))


def test_a_damaged_sample_is_named(tmp_path: Path, digit_images: Path, settings: Make) -> None:
    pack(digit_images / "val", tmp_path / "val")
    shards = ShardSet(tmp_path / "val")
    path = shards.tar("shard-000000")
    data = bytearray(path.read_bytes())
    data[int(shards.index(0)[7]["offset"]) + 20] ^= 255
    path.write_bytes(data)
    feed = TrainFeed(settings(f"data.train={tmp_path / 'val'}"), shards, World())
    with pytest.raises(CorruptSampleError, match=rf"shard-000000.tar: sample '{shards.key(0, 7)}'"):
        [feed.next() for _ in range(7)]
    feed.close()
