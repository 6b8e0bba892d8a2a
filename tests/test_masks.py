"""Images and label maps that are cut, scaled, turned and padded together, and fed the same on every world."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from pipeline import keys
from pipeline.config import Config, ImageConfig, SemanticFpnConfig, load_config
from pipeline.errors import InputError
from pipeline.feed import augment
from pipeline.feed.loader import EvalFeed, MicroBatch, TrainFeed
from pipeline.feed.task_transforms import MaskTarget
from pipeline.keys import Stream
from pipeline.pictures.palette import palette
from pipeline.shards import ade20k
from pipeline.shards.images import IGNORED
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.world import World
from tests.conftest import write_config

CLASSES = 6
COUNT = 40
CROP = 64
COLOURS = np.zeros((256, 3), np.uint8)
COLOURS[:CLASSES] = palette(CLASSES)
COLOURS[IGNORED] = 255


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set in which a pixel's colour tells its class: so an image says what its map has to be."""
    root = tmp_path_factory.mktemp("coloured")
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        height, width = rng.integers(40, 150, 2)
        blocks = rng.choice([*range(CLASSES), IGNORED], (5, 7)).astype(np.uint8)
        labels = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))
        stored = np.where(labels == IGNORED, rng.choice([0, 255]), labels + 1).astype(np.uint8)
        Image.fromarray(COLOURS[labels]).save(root / f"images/training/{number}.png")
        Image.fromarray(stored).save(root / f"annotations/training/{number}.png")
    table = "".join(f"{number + 1}\t0\t0\t0\tclass {number}\n" for number in range(CLASSES))
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{table}")
    pack(ade20k.find(root / "annotations/training"), root / "packed", samples_per_shard=12)
    return root / "packed"


def make_config(data: Path, folder: Path, *overrides: str, **task: object) -> Config:
    tree: dict[str, Any] = yaml.safe_load(write_config(data, folder).read_text())
    tree |= {"task": {"name": "semantic_fpn", **task}, "augment": {}, "mix": {}}
    tree["data"] |= {"train": str(data), "val": None, "lanes": 4, "shuffle_window": 8}
    tree["image"] |= {"size": CROP, "interpolation": "nearest"}
    tree["train"] |= {"global_batch_size": 12}
    path = folder / "masks.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, list(overrides))


def colours(images: Tensor) -> np.ndarray:
    """[n, 3, H, W] as the network sees them, with mean and deviation 0.5, back to [n, H, W, 3] uint8."""
    return (255 * (images * 0.5 + 0.5)).round().byte().permute(0, 2, 3, 1).numpy()


def extent_of(labels: Tensor, image: np.ndarray) -> tuple[int, int]:
    """Height and width of what is no padding: normalised zeros are grey, which is no class's colour."""
    assert not (COLOURS == 128).all(axis=1).any()
    filled = ~(image == 128).all(axis=-1)
    return int(filled.any(axis=1).sum()), int(filled.any(axis=0).sum())


def test_image_crop_is_aligned_with_target_crop(coloured: Path, tmp_path: Path) -> None:
    chosen = make_config(coloured, tmp_path, max_class_fraction=0.35)  # so that some crops are drawn again
    feed = TrainFeed(chosen, ShardSet(coloured), World())
    padded = flat = 0
    for _ in range(8):
        (batch,) = feed.next()
        assert batch.targets.dtype == torch.int64
        assert batch.targets.shape == (12, CROP, CROP)
        for image, target in zip(colours(batch.images), batch.targets, strict=True):
            height, width = extent_of(target, image)
            np.testing.assert_array_equal(image[:height, :width], COLOURS[target[:height, :width].numpy()])
            assert (target[height:] == IGNORED).all()
            assert (target[:, width:] == IGNORED).all()
            padded += height < CROP or width < CROP
            flat += len(target.unique()) <= 2
    feed.close()
    assert 10 < padded < 86, "some crops are padded and some are not"
    assert flat < 48, "and most show several classes"


def test_flips_and_scales_follow_configuration(coloured: Path, tmp_path: Path) -> None:
    hw = np.full((4000, 2), (100, 140))
    chosen = make_config(coloured, tmp_path, short_side=96, long_side=120, scale=[0.5, 2.0])
    assert isinstance(chosen.task, SemanticFpnConfig)
    key = keys.key(0, Stream.AUGMENT, np.arange(len(hw)))
    views = augment.scaled_crops(chosen.augment, chosen.task, chosen.image, key, hw)
    assert abs(views.flip.mean() - 0.5) < 0.03
    # The long side, which would be 134 px, is what limits: 120 px, and half to twice of that.
    scales = views.extent[:, 1] / views.shape[:, 1] / (120 / 140)
    assert scales.min() < 0.52
    assert scales.max() > 1.95
    assert abs(np.median(scales) - 1.25) < 0.05
    assert (views.anchor >= 0).all()
    assert (views.anchor + views.shape <= hw).all()
    assert (views.extent <= CROP).all()
    # A pixel is as high as it is wide, but for windows of whole pixels.
    np.testing.assert_allclose(views.extent[:, 0] / views.shape[:, 0], scales * 120 / 140, rtol=0.03)


def test_crop_dominated_by_one_class_is_redrawn(coloured: Path, tmp_path: Path) -> None:
    def shares(limit: float) -> np.ndarray:
        feed = TrainFeed(make_config(coloured, tmp_path, max_class_fraction=limit), ShardSet(coloured), World())
        targets = torch.cat([feed.next()[0].targets for _ in range(8)])
        feed.close()
        counts = [np.bincount(target.flatten(), minlength=256)[:IGNORED] for target in targets.numpy()]
        return np.array([count.max() / count.sum() for count in counts])

    free, limited = shares(1.0), shares(0.35)
    assert (free > 0.35).mean() > 0.15
    assert (limited > 0.35).mean() < 0.6 * (free > 0.35).mean()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_world_size_sees_same_batches(coloured: Path, tmp_path: Path, ranks: int) -> None:
    def batches(rank: int, size: int) -> list[MicroBatch]:
        feed = TrainFeed(make_config(coloured, tmp_path), ShardSet(coloured), World(rank, size), first_step=3)
        found = [feed.next()[0] for _ in range(2)]
        feed.close()
        return found

    for whole, *parts in zip(batches(0, 1), *(batches(rank, ranks) for rank in range(ranks)), strict=True):
        seen = 0
        for part in parts:
            for i in np.flatnonzero(part.weights.numpy()):
                place = int(np.flatnonzero(whole.samples.position == part.samples.position[i])[0])
                assert torch.equal(part.images[i], whole.images[place])
                assert torch.equal(part.targets[i], whole.targets[place])
                seen += 1
        assert seen == 12


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_takes_every_whole_image_once_padded(coloured: Path, tmp_path: Path, ranks: int) -> None:
    shards, chosen = ShardSet(coloured), make_config(coloured, tmp_path, short_side=48, long_side=100)
    seen: list[int] = []
    for rank in range(ranks):
        for batch in EvalFeed(shards, World(rank, ranks), chosen.image, task=chosen.task, batch_size=3):
            assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
            for i in np.flatnonzero(batch.weights.numpy()):
                target, record = batch.targets[i], shards.index(batch.samples.shard[i])[batch.samples.row[i]]
                assert isinstance(target, MaskTarget)
                assert target.labels.shape == (record["height"], record["width"])
                assert max(target.extent) <= 100
                assert min(target.extent) <= 48
                (height, width), image = target.extent, colours(batch.images[i : i + 1])[0]
                assert (batch.images[i, :, height:] == 0).all()
                assert (batch.images[i, :, :, width:] == 0).all()
                rows = (np.arange(height) + 0.5) * record["height"] // height
                columns = (np.arange(width) + 0.5) * record["width"] // width
                expected = target.labels.numpy()[np.ix_(rows.astype(int), columns.astype(int))]
                np.testing.assert_array_equal(image[:height, :width], COLOURS[expected])
                seen.append(int(batch.samples.id[i]))
    assert sorted(seen) == list(range(COUNT))


def test_sample_with_damaged_label_map_is_skipped(coloured: Path, tmp_path: Path) -> None:
    shards = ShardSet(coloured)
    record = shards.index(0)[3]
    tar = Path(shards.url(0))
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in tar.parent.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    with (spoiled / tar.name).open("r+b") as file:
        file.seek(int(record["annotation_offset"]) + 20)
        file.write(b"\0" * 8)
    chosen = make_config(coloured, tmp_path)
    batches = list(EvalFeed(ShardSet(spoiled), World(), chosen.image, task=chosen.task, batch_size=4))
    assert sum(int(batch.weights.sum()) for batch in batches) == COUNT - 1
    feed = TrainFeed(chosen.model_copy(update={"data": chosen.data}), ShardSet(spoiled), World())
    ids = [int(i) for _ in range(4) for i in feed.next()[0].samples.id]
    feed.close()
    assert 3 not in ids
    assert len(ids) == 48


def test_data_of_wrong_kind_is_rejected(coloured: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds labelled images, but task semantic_fpn needs images with label maps"):
        TrainFeed(make_config(coloured, tmp_path), ShardSet(digits / "train"), World())
    with pytest.raises(InputError, match="holds images with label maps, but task classification needs labelled"):
        EvalFeed(ShardSet(coloured), World(), ImageConfig(size=32), batch_size=4)
