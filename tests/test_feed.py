"""Mixing against timm; the same pixels, targets and masks on every world."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup

from pipeline import keys
from pipeline.config import Config, ImageConfig, MixConfig, load_config
from pipeline.feed import mixup
from pipeline.feed.image_stream import tensors_in
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.feed.quarantine import Quarantine, TooManyBadSamplesError
from pipeline.feed.task_transforms import MaskTarget
from pipeline.keys import Stream
from pipeline.shards import index_tars
from pipeline.shards.index import Manifest, ShardSet, read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.store import Cache
from pipeline.world import World
from pvt.detector import Objects
from tests.chaos import damaged_feed
from tests.conftest import write_config
from tests.damage import CLASSES, build
from tests.servers import FaultyServer

Make = Callable[..., Config]


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_a_lane_matches_timm_mixup(mixup_alpha: float, cutmix_alpha: float) -> None:
    config = MixConfig(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, prob=0.9, label_smoothing=0.1)
    images, labels = torch.randn(2, 3, 24, 32), torch.tensor([3, 7])
    kinds = set()
    for lane in range(60):
        key = keys.key(5, Stream.MIX, 0, np.array([lane]))
        blends = mixup.draw(config, key, 24, 32)[np.array([0, 0])]
        # timm draws from numpy's global generator; let it draw from this lane's.
        rng = keys.generator(key[0])
        with mock.patch.multiple("numpy.random", rand=rng.random, beta=rng.beta, randint=rng.integers):
            theirs = Mixup(mixup_alpha, cutmix_alpha, prob=0.9, label_smoothing=0.1, num_classes=10)
            expected, targets = theirs(images.clone(), labels)
        torch.testing.assert_close(mixup.mix_images(images, blends), expected)
        torch.testing.assert_close(mixup.mix_targets(mixup.soft_targets(labels, 10, 0.1), blends), targets)
        kinds.add("cutmix" if blends.box.any() else "mixup" if blends.label_weight[0] < 1 else "none")
    assert kinds >= {"none"} | ({"mixup"} if mixup_alpha else set()) | ({"cutmix"} if cutmix_alpha else set())


Consumed = dict[tuple[int, int], tuple[int, bytes, bytes, bytes]]


def consume(config: Config, world_size: int, first_step: int, steps: int, quarantine: Path | None = None) -> Consumed:
    """What all ranks of a world consume, one after the other."""
    shards = ShardSet(*config.data.train_paths)
    consumed: Consumed = {}
    for rank in range(world_size):
        found = consume_rank(config, shards, World(rank, world_size), first_step, steps, quarantine)
        assert consumed.keys().isdisjoint(found)
        consumed |= found
    return consumed


def consume_rank(
    config: Config, shards: ShardSet, world: World, first_step: int, steps: int, quarantine: Path | None = None
) -> Consumed:
    """(step, position) of every weighing sample to its id, pixels, target and drop-path mask."""
    consumed: Consumed = {}
    feed = TrainFeed(
        config,
        shards,
        world,
        first_step=first_step,
        drop_path_rates=[0.0, 0.1, 0.2, 0.3, 0.4],
        quarantine=Quarantine(shards, quarantine, config.data.max_bad_fraction),
    )
    with contextlib.closing(feed):
        for step in range(first_step, first_step + steps):
            for batch in feed.next():
                assert batch.drop_path is not None
                for n in np.flatnonzero(batch.weights.numpy()):
                    tensors = batch.images[n], batch.targets[n], batch.drop_path[:, n]
                    pixels, target, mask = (tensor.numpy().tobytes() for tensor in tensors)
                    where = step, int(batch.samples.position[n])
                    consumed[where] = int(batch.samples.id[n]), pixels, target, mask
    return consumed


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Consumed:
    config = load_config(write_config(digits, tmp_path_factory.mktemp("reference")))
    consumed = consume(config, 1, 28, 3)  # an epoch has 29 steps, so this crosses into the next
    assert len(consumed) == 3 * 48
    return consumed


@pytest.mark.parametrize(("world_size", "micro"), [(1, 10), (2, None), (3, 4), (4, 8), (5, None), (7, 6), (12, 2)])
def test_every_world_size_is_fed_same_batches(
    make_config: Make, reference: Consumed, world_size: int, micro: int | None
) -> None:
    other = make_config(f"train.micro_batch_size={'null' if micro is None else micro}", "data.prefetch=3")
    assert consume(other, world_size, 28, 3) == reference


def test_seeking_to_step_matches_sequential_feed(make_config: Make, reference: Consumed) -> None:
    assert consume(make_config(), 2, 30, 1) == {where: what for where, what in reference.items() if where[0] == 30}


def test_pixels_belong_to_their_sample_ids(tmp_path: Path, make_config: Make) -> None:
    # Each image is one flat grey that says its number, so that the tensors themselves tell which sample they are.
    for number in range(60):
        path = tmp_path / "images" / "grey" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (4 * number,) * 3).save(path)
    pack(tmp_path / "images", tmp_path / "packed", samples_per_shard=7)
    shards = ShardSet(tmp_path / "packed")
    plain = make_config("mix={}", "train.global_batch_size=12")
    feed = TrainFeed(plain, shards, World())
    for _ in range(5):
        (batch,) = feed.next()
        numbers = ((batch.images * 0.5 + 0.5) * 255 / 4).round().mean(dim=(1, 2, 3))
        pairs = zip(batch.samples.shard, batch.samples.row, strict=True)
        assert numbers.tolist() == [int(shards.key(shard, row).split("/")[1]) for shard, row in pairs]
    feed.close()


def test_drop_path_masks_follow_their_rates(make_config: Make) -> None:
    rates = [0.0, 0.1, 0.5]
    feed = TrainFeed(make_config(), ShardSet(*make_config().data.train_paths), World(), drop_path_rates=rates)
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
    shards, image = ShardSet(digits / "val"), ImageConfig(size=32)
    taken: list[int] = []
    for rank in range(world_size):
        batches = list(EvalFeed(shards, World(rank, world_size), image, batch_size=50))
        assert len(batches) == -(-len(shards) // (50 * world_size))
        for batch in batches:
            taken += batch.samples.id[batch.weights.numpy() > 0].tolist()
    assert sorted(taken) == list(range(len(shards)))


FULL = ["augment.rand_augment=rand-m9-mstd0.5-inc1", "augment.erase_prob=0.25"]


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([*FULL, "data.copies=3"], 3),
        ([*FULL, "augment.color_jitter=0", "augment.size_schedule={29 steps: 24}"], 5),
        (["augment.color_jitter=0.4", "augment.crop=plain", "augment.erase_prob=0.5", "augment.erase_mode=const"], 4),
    ],
)
def test_augmentation_recipes_are_same_on_every_world_size(
    make_config: Make, overrides: list[str], world_size: int
) -> None:
    lone = consume(make_config(*overrides), 1, 27, 4)
    assert consume(make_config(*overrides, "train.micro_batch_size=6"), world_size, 27, 4) == lone
    ids = [sample_id for (step, _), (sample_id, *_) in lone.items() if step == 27]
    assert len(ids) == 48
    assert len(set(ids)) == (24 if "data.copies=3" in overrides else 48)  # two draws and their copies in a share of 4
    assert len({pixels for _, pixels, *_ in lone.values()}) == len(lone)


def test_resolution_schedule_changes_size_at_its_step(make_config: Make) -> None:
    scheduled = make_config("train.length=40 steps", "augment.size_schedule={2 steps: 16, 10 %: 48}")
    feed = TrainFeed(scheduled, ShardSet(*scheduled.data.train_paths), World())
    shapes = [feed.next()[0].images.shape[2:] for _ in range(6)]
    feed.close()
    assert shapes == [(32, 32), (32, 32), (16, 16), (16, 16), (48, 48), (48, 48)]


def test_data_mixture_feeds_both_data_sets_by_weight(make_config: Make, digits: Path) -> None:
    both = [{"path": str(digits / "train"), "weight": 3}, {"path": str(digits / "val"), "weight": 1}]
    mixed = make_config(f"data.train={json.dumps(both)}", "augment.crop=center")
    consumed = consume(mixed, 1, 0, 10)
    assert consume(mixed, 5, 0, 10) == consumed
    from_train = np.mean([sample_id < 1437 for sample_id, *_ in consumed.values()])
    assert abs(from_train - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(consumed))


def spoil(folder: Path, shard: int, rows: list[int], *, seemingly_whole: bool = False) -> None:
    """Damage samples of a packed data set; `seemingly_whole` ones end too early and have the checksums of that."""
    manifest = read_manifest(folder)
    entry = manifest.shards[shard]
    tar, index = folder / entry.tar.name, folder / entry.index.name
    data, records = bytearray(tar.read_bytes()), np.load(index)
    for row in rows:
        begin, size = int(records["offset"][row]), int(records["size"][row])
        if seemingly_whole:
            records["size"][row] = size - 30
            records["crc32"][row] = zlib.crc32(data[begin : begin + size - 30])
        else:
            data[begin : begin + size] = bytes(size)
    tar.write_bytes(data)
    if seemingly_whole:
        np.save(index, records)
        changed = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": _sha256(index)}
        shards = list(manifest.shards)
        shards[shard] = dataclasses.replace(entry, **changed)
        (folder / "manifest.json").write_text(Manifest.of(manifest.classes, shards).model_dump_json())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def damaged(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with five samples whose bytes changed and five that were packed broken."""
    folder = tmp_path_factory.mktemp("data") / "damaged"
    shutil.copytree(digits / "train", folder)
    spoil(folder, 0, [3, 90, 91], seemingly_whole=True)
    spoil(folder, 5, [0, 199], seemingly_whole=True)
    spoil(folder, 3, [7, 8, 9])
    spoil(folder, 6, [0, 1])
    return folder


BAD = {3, 90, 91, 1000, 1199, 607, 608, 609, 1200, 1201}  # as ids: shards hold 200 samples
ALLOW_BAD = "data.max_bad_fraction=0.01"


@pytest.fixture(scope="module")
def lone(digits: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Consumed, Path]:
    """What one rank is fed of the damaged data in more than an epoch, and the list of what it found."""
    folder = tmp_path_factory.mktemp("lone")
    config = load_config(write_config(digits, folder), [f"data.train={damaged}", ALLOW_BAD])
    return consume(config, 1, 0, 30, folder / "quarantine.jsonl"), folder / "quarantine.jsonl"


def test_damaged_samples_are_listed_and_nothing_else_shifts(
    make_config: Make, damaged: Path, lone: tuple[Consumed, Path]
) -> None:
    fed, quarantine = lone
    assert BAD.isdisjoint(sample_id for sample_id, *_ in fed.values())
    found = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {200 * line["shard"] + line["row"] for line in found} == BAD
    assert {line["reason"] for line in found} == {
        "its bytes do not match their checksum",
        "its bytes are as they were packed, but they do not decode",
    }
    shards = ShardSet(damaged)
    assert all(line["key"] == shards.key(line["shard"], line["row"]) for line in found)
    assert all(line["tar"].endswith(f"shard-{line['shard']:06d}.tar") for line in found)
    # All other positions are as without the damage.
    whole = consume(make_config(), 1, 0, 30)
    mixed_with = {(step, position ^ 1) for (step, position), (sample_id, *_) in whole.items() if sample_id in BAD}
    for where, (sample_id, *tensors) in whole.items():
        if sample_id in BAD:
            assert fed[where][0] not in {sample_id, fed[where[0], where[1] ^ 1][0]}
        elif where not in mixed_with:
            assert fed[where] == (sample_id, *tensors)


@pytest.mark.parametrize(("world_size", "micro"), [(3, 4), (5, 6)])
def test_damaged_samples_are_replaced_alike_on_every_world_size(
    make_config: Make, damaged: Path, lone: tuple[Consumed, Path], tmp_path: Path, world_size: int, micro: int
) -> None:
    # With nothing known, and from the middle on with everything known.
    fed, found = lone
    quarantine = Path(shutil.copy(found, tmp_path / "quarantine.jsonl"))
    other = make_config(f"data.train={damaged}", ALLOW_BAD, f"train.micro_batch_size={micro}")
    assert consume(other, world_size, 0, 30, tmp_path / "other.jsonl") == fed
    later = {where: what for where, what in fed.items() if where[0] >= 13}
    assert consume(other, world_size, 13, 17, quarantine) == later


def test_damaged_data_is_fed_by_replacement_rule(tmp_path: Path) -> None:
    packed, indexed = damaged_feed.run(0, tmp_path)
    assert packed["replaced"] > 20
    assert indexed["replaced"] > 20


def test_gpu_feed_path_matches_cpu_path(make_config: Make) -> None:
    # Everything but CUDA's own: DALI resizes, a batch is finished and mixed at a time, in the feed's thread.
    mixed = make_config("augment.rand_augment=rand-m9-mstd0.5-inc1", "augment.erase_prob=0.5", "mix.cutmix_alpha=1.0")
    shards = ShardSet(*mixed.data.train_paths)
    usual, other = (TrainFeed(mixed, shards, World(), drop_path_rates=[0.1, 0.2]) for _ in range(2))
    stream = other._stream
    stream._decoder.close()
    stream._decoder_settings["resizes"] = stream._on_gpu = True
    stream._decoder = stream._new_decoder()
    stream._cuda_stream = mock.Mock()
    with contextlib.closing(usual), contextlib.closing(other), mock.patch("torch.cuda.stream") as entered:
        for number in range(1, 4):
            (expected,), (made,) = usual.next(), other.next()
            assert stream._cuda_stream.synchronize.call_count >= number
            assert entered.call_args.args == (stream._cuda_stream,)
            assert (made.images - expected.images).abs().mean() < 0.02  # of a standard deviation: DALI's filter
            for name in ("targets", "weights", "drop_path"):
                assert torch.equal(getattr(made, name), getattr(expected, name)), name


def test_tensors_in_yields_all_tensors_of_batch(make_config: Make) -> None:
    feed = TrainFeed(make_config(), ShardSet(*make_config().data.train_paths), World())
    batch = feed.blank(0)[0]
    feed.close()
    objects = [Objects(torch.ones(2, 4), torch.ones(2), torch.ones(2, 8, 8)), Objects(torch.ones(0, 4), torch.ones(0))]
    maps = [MaskTarget(torch.ones(8, 8), (8, 8))]
    drop_path = torch.ones(3, len(batch.weights))
    for targets, inside in (
        (batch.targets, [batch.targets]),
        (objects, [objects[0].boxes, objects[0].labels, objects[0].masks, objects[1].boxes, objects[1].labels]),
        (maps, [maps[0].labels]),
    ):
        made = batch._replace(targets=targets, drop_path=drop_path)
        found = list(tensors_in(made))
        assert [id(tensor) for tensor in found] == list(map(id, [made.images, *inside, made.weights, drop_path]))


def test_too_many_damaged_samples_stop_run_and_are_listed(make_config: Make, damaged: Path) -> None:
    with pytest.raises(TooManyBadSamplesError, match=r"more than data.max_bad_fraction allows \(4\)") as caught:
        consume(make_config(f"data.train={damaged}", "data.max_bad_fraction=0.003"), 1, 0, 30)
    assert str(caught.value).count("shard-00000") == 5


def test_evaluation_gives_damaged_samples_zero_weight(damaged: Path) -> None:
    shards = ShardSet(damaged)
    for world_size in (1, 3):
        taken: list[int] = []
        for rank in range(world_size):
            for batch in EvalFeed(shards, World(rank, world_size), ImageConfig(size=32), batch_size=50):
                taken += batch.samples.id[batch.weights.numpy() > 0].tolist()
        assert sorted(taken) == sorted(set(range(1437)) - BAD)


def test_remote_shards_feed_same_batches(make_config: Make, reference: Consumed, digits: Path, tmp_path: Path) -> None:
    with FaultyServer(digits) as server:
        # Every tenth answer fails, in a way of its own each time.
        for fault in ("500", "reset", "cut", "short"):
            server.spoil(fault, times=2, match=".tar")
        remote = make_config("data.train=URL")
        cache = Cache(tmp_path / "cache", 10**9)
        for ranks in (1, 3):
            consumed: Consumed = {}
            for rank in range(ranks):
                shards = ShardSet(f"{server.url}/train", cache=cache)
                consumed |= consume_rank(remote, shards, World(rank, ranks), 28, 3)
                shards.close()
            assert consumed == reference
        fetched = {request.path for request in server.gets(".tar")}
    assert fetched
    entries = read_manifest(digits / "train").shards
    expected = {entry.sha256 for entry in entries if f"/train/{entry.tar.name}" in fetched}
    assert expected <= {path.name for path in cache.folder.iterdir()}


def test_undamaged_samples_of_damaged_data_set_are_fed(make_config: Make, tmp_path: Path) -> None:
    damage = build(tmp_path / "damage")
    index_tars.index_tars(str(damage.shards), tmp_path / "index", skip_bad=True, decode=False)
    pack(damage.images, tmp_path / "packed", classes=list(CLASSES), skip_bad=True)
    shards = ShardSet(tmp_path / "index")
    keys_of = {
        (shard, row): shards.key(shard, row) for shard, size in enumerate(shards.shard_samples) for row in range(size)
    }
    assert set(keys_of.values()) == damage.good_keys | damage.hidden_keys
    for data, bad in ((tmp_path / "index", damage.hidden_keys), (tmp_path / "packed", set())):
        allowed = make_config(f"data.train={data}", "data.max_bad_fraction=0.1", "train.global_batch_size=24")
        quarantine = tmp_path / f"{data.name}.jsonl"
        steps = 2 * (len(ShardSet(data)) // 24)
        lone = consume(allowed, 1, 0, steps, quarantine)
        assert consume(allowed, 3, 0, steps) == lone
        lines = quarantine.read_text().splitlines() if quarantine.exists() else []
        # PIL refuses some pixels that DALI's decoders draw something for, never the other way round.
        assert {json.loads(line)["key"] for line in lines} <= bad
        assert bool(lines) == bool(bad)
