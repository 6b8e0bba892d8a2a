"""The order's arithmetic: bijections, coverage, and the same global batches on every world."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.order import Order, padding_waste, partition
from pipeline.feed.permutation import permute
from pipeline.keys import Stream


def cut(micro_batch_size: int | None, *, pairs: bool = False) -> Config:
    """As much of a Config as `partition` reads."""
    train, mix = SimpleNamespace(micro_batch_size=micro_batch_size), SimpleNamespace(is_active=pairs)
    return cast(Config, SimpleNamespace(train=train, mix=mix, describe_more_lanes=lambda ranks: f"lanes for {ranks}"))


def near_powers_of_two() -> list[int]:
    return sorted({max(1, 2**k + d) for k in range(11) for d in (-1, 0, 1)})


@pytest.mark.parametrize("size", near_powers_of_two())
def test_permute_is_a_bijection(size: int) -> None:
    for seed in range(3):
        image = permute(np.arange(size), size, keys.key(seed, Stream.WINDOW))
        assert sorted(image) == list(range(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 + 1, 10**12, 2**60])
def test_permute_is_in_range_and_injective_for_huge_sizes(size: int) -> None:
    index = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    image = permute(index, size, keys.key(0, Stream.WINDOW))
    assert ((image >= 0) & (image < size)).all()
    assert len(set(image.tolist())) == len(index)


def test_permute_is_uniform_by_chi_squared() -> None:
    # Where each of 8 places goes, over 8,000 keys, against the flat expectation of 1,000 in each of 64 cells.
    images = permute(np.arange(8)[None], 8, keys.key(0, Stream.WINDOW, np.arange(8000))[:, None])
    counts = np.array([np.bincount(images[:, place], minlength=8) for place in range(8)])
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 94.6  # 99.99 % of chi-squared with 49 degrees of freedom


@st.composite
def orders(draw: st.DrawFn, most_copies: int = 1) -> Order:
    shards = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=12)))
    lanes, share = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    batch = lanes * share
    if shards.sum() < batch:
        shards = np.append(shards, batch)
    return make(
        shards,
        seed=draw(st.integers(0, 2**32 - 1)),
        global_batch_size=batch,
        lanes=lanes,
        shuffle_window=draw(st.integers(1, 64)),
        copies=draw(st.integers(1, most_copies)),
    )


def make(*parts: np.ndarray, seed: int = 0, **config: Any) -> Order:
    return Order(parts, seed=seed, **config)


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 3))
def test_epoch_takes_each_sample_once_except_the_tail(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    steps = [order.samples(first + k) for k in range(order.steps_per_epoch)]
    taken = np.concatenate([samples.id for samples in steps])
    assert len(set(taken.tolist())) == len(taken) == order.steps_per_epoch * order.global_batch_size
    assert order.num_samples - len(taken) < order.global_batch_size
    assert all((samples.position == np.arange(order.global_batch_size)).all() for samples in steps)
    assert all((samples.epoch == epoch).all() for samples in steps)


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 200))
def test_sample_ids_match_shard_and_row(order: Order, step: int) -> None:
    samples = order.samples(step)
    sizes = order._sources[0]._shard_samples
    assert ((samples.row >= 0) & (samples.row < sizes[samples.shard])).all()
    assert (samples.id == (np.cumsum(sizes) - sizes)[samples.shard] + samples.row).all()


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(1, 8), st.integers(1, 9), st.booleans(), st.integers(0, 100))
def test_partition_gives_the_same_global_batch_for_every_world_size(
    order: Order, world: int, micro: int, pairs: bool, step: int
) -> None:
    if world > order.lanes:
        with pytest.raises(InputError, match="ranks"):
            partition(order, 0, world, cut(micro))
        return
    parts = [partition(order, rank, world, cut(micro, pairs=pairs)) for rank in range(world)]
    assert len({(part.accumulation, part.micro_batch_size) for part in parts}) == 1
    assert all(part.num_samples <= part.accumulation * part.micro_batch_size for part in parts)
    assert parts[0].micro_batch_size <= micro + (pairs and micro % 2)
    assert not (pairs and parts[0].micro_batch_size % 2)
    dealt = np.concatenate([order.samples(step, part.lanes).id for part in parts])
    assert (dealt == order.samples(step).id).all()


def test_skipped_tail_rotates_over_all_samples_across_epochs() -> None:
    # One shard and a tail of 3: without the rotation the same samples would always be skipped.
    order = make(np.array([35]), global_batch_size=32, lanes=4, shuffle_window=1)
    left_out = [set(range(35)) - set(order.samples(epoch).id.tolist()) for epoch in range(200)]
    assert set.union(*left_out) == set(range(35))


def test_one_rank_of_four_reads_a_quarter_of_the_shards() -> None:
    order = make(np.full(400, 25), global_batch_size=200, lanes=8, shuffle_window=100)
    part = partition(order, 1, 4, cut(None))
    opened = {s for k in range(order.steps_per_epoch) for s in order.samples(k, part.lanes).shard.tolist()}
    assert len(opened) <= 102


def test_padding_waste_is_computed_from_world_and_micro_batch() -> None:
    order = make(np.array([100]), global_batch_size=48, lanes=12, shuffle_window=1)
    assert padding_waste(order, 4, cut(None)) == 0
    assert padding_waste(order, 5, cut(None)) == pytest.approx(1 - 48 / (5 * 12))
    assert padding_waste(order, 1, cut(20)) == 0  # three times 16
    assert padding_waste(order, 1, cut(10, pairs=True)) == pytest.approx(1 - 48 / 50)


def test_samples_of_a_step_do_not_depend_on_earlier_calls() -> None:
    def order() -> Order:
        return make(np.array([40, 60]), seed=3, global_batch_size=12, lanes=4, shuffle_window=16)

    walked = order()
    for step in range(50):
        walked.samples(step)
    for name, value in dataclasses.asdict(walked.samples(50)).items():
        assert np.array_equal(value, getattr(order().samples(50), name))


def test_data_set_smaller_than_global_batch_is_rejected() -> None:
    with pytest.raises(InputError, match="31 samples"):
        make(np.array([31]), global_batch_size=32, lanes=4, shuffle_window=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 56, 64, 1024])
def test_global_batch_is_the_same_up_to_1024_ranks(world_size: int) -> None:
    order = make(np.full(200, 1000), seed=1, global_batch_size=4096, lanes=1024, shuffle_window=64, copies=3)
    parts = [partition(order, rank, world_size, cut(512, pairs=True)) for rank in range(world_size)]
    assert len({(part.accumulation, part.micro_batch_size) for part in parts}) == 1
    dealt = [order.samples(7, part.lanes) for part in parts]
    whole = order.samples(7)
    for field in dataclasses.fields(whole):
        values = np.concatenate([getattr(samples, field.name) for samples in dealt])
        assert (values == getattr(whole, field.name)).all()


@settings(deadline=None, max_examples=60)
@given(orders(most_copies=4), st.integers(0, 3))
def test_copies_share_a_batch_but_are_never_adjacent(order: Order, epoch: int) -> None:
    draws = order._draws
    seen: set[int] = set()
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        samples = order.samples(step)
        ids, copies = samples.id.reshape(order.lanes, -1), samples.copy.reshape(order.lanes, -1)
        for lane, copy in zip(ids, copies, strict=True):
            assert len(set(lane.tolist())) == draws
            assert not seen & set(lane.tolist())  # in no other batch and no other lane of this epoch
            seen |= set(lane.tolist())
            assert len(set(zip(lane.tolist(), copy.tolist(), strict=True))) == order.share
            if draws > 1:
                assert (lane[1:] != lane[:-1]).all()
    assert len(seen) == order.steps_per_epoch * order.lanes * draws


def mixture(copies: int = 1) -> Order:
    parts = np.full(40, 100), np.array([70, 30, 500]), np.full(3, 1000)
    return make(*parts, weights=[6, 1, 3], global_batch_size=96, lanes=12, shuffle_window=128, copies=copies)


def test_mixture_draws_by_weight_with_separate_epochs_per_data_set() -> None:
    order = mixture()
    first_id = np.array([0, 4000, 4600, 7600])
    steps = 4096 // order.share  # once through every lane's pattern
    ids = np.concatenate([order.samples(step).id.reshape(12, -1) for step in range(steps)], axis=1)
    part = np.searchsorted(first_id, ids, side="right") - 1
    for lane in range(12):
        counts = np.bincount(part[lane], minlength=3)
        assert np.abs(counts / 4096 - [0.6, 0.1, 0.3]).max() <= 1 / 4096
    # Lanes do not share samples, and a lane takes all of its own before it takes one again.
    for number, size in enumerate([4000, 600, 3000]):
        lane_length = size // 12
        of_lane = [ids[lane][part[lane] == number] for lane in range(12)]
        for lane in of_lane:
            for start in range(0, len(lane) - lane_length, lane_length):
                assert len(set(lane[start : start + lane_length].tolist())) == lane_length
        first_pass = np.concatenate([lane[:lane_length] for lane in of_lane])
        assert len(set(first_pass.tolist())) == len(first_pass)


def test_mixture_shares_are_even_across_batches() -> None:
    order = mixture()
    shares = [np.mean(order.samples(step).id < 4000) for step in range(400)]
    deviation = np.sqrt(0.6 * 0.4 / order.global_batch_size)
    assert abs(np.mean(shares) - 0.6) < 4 * deviation / 20
    assert np.std(shares) < 1.3 * deviation


@pytest.mark.parametrize("world_size", [2, 5, 12])
def test_mixture_with_copies_is_the_same_on_every_world_size(world_size: int) -> None:
    order = mixture(copies=3)
    parts = [partition(order, rank, world_size, cut(None)) for rank in range(world_size)]
    for step in (0, 1, 511, 512, 5000):
        ids = np.concatenate([order.samples(step, part.lanes).id for part in parts])
        assert (ids == order.samples(step).id).all()


def test_mixture_rejects_too_small_data_set_or_weight() -> None:
    with pytest.raises(InputError, match="data set 2 of the mixture has 11 samples for 12 lanes"):
        make(np.array([100]), np.array([11]), weights=[1, 1], global_batch_size=48, lanes=12, shuffle_window=8)
    with pytest.raises(InputError, match="exact to 1/4096"):
        make(np.array([99]), np.array([99]), weights=[1, 1e-5], global_batch_size=48, lanes=12, shuffle_window=8)


@settings(deadline=None, max_examples=40)
@given(orders(most_copies=2), st.integers(0, 60))
def test_shards_ahead_include_those_of_the_current_step(order: Order, step: int) -> None:
    ahead = set(order.shards_ahead(step).tolist())
    assert set(order.samples(step).shard.tolist()) <= ahead


def test_shuffle_quality_is_close_to_a_uniform_permutation() -> None:
    # 40,000 samples of 100 classes in 40 shards that were packed with a shuffle.
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(100), 400))
    measured: dict[str, list[tuple[float, float, float]]] = {"ours": [], "uniform": []}
    for seed in range(8):
        order = make(np.full(40, 1000), seed=seed, global_batch_size=400, lanes=20, shuffle_window=1000)
        ids = np.concatenate([order.samples(step).id for step in range(order.steps_per_epoch)])
        measured["ours"].append(shuffle_quality(ids, label))
        measured["uniform"].append(shuffle_quality(rng.permutation(len(ids)), label))
    rms = {name: np.sqrt(np.mean(np.square(values), axis=0)) for name, values in measured.items()}
    for name, (correlation, neighbours, chi2) in rms.items():
        print(f"\n{name}: rank correlation {correlation:.4f}, neighbours kept {neighbours:.6f}, chi² {chi2:.4f}")
    correlation, neighbours, chi2 = rms["ours"]
    # Whole shards are permuted, of which there are few; a batch takes from 20 places, which evens it out.
    assert correlation < 0.1
    assert neighbours < 2.2 / 1000  # of a uniform permutation of each window
    assert abs(chi2 - 1) < 0.02


def shuffle_quality(ids: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation of an order with the stored one, the fraction of consecutive pairs that are neighbours there
    too, and the chi-squared of classes in batches of 400 over its expectation."""
    ranks: Any = scipy.stats.spearmanr(ids, np.arange(len(ids)))
    neighbours = np.mean(np.abs(np.diff(ids)) == 1)
    counts = np.stack([np.bincount(batch, minlength=100) for batch in label[ids].reshape(-1, 400)])
    return float(ranks.statistic), float(neighbours), float(((counts - 4) ** 2 / 4).sum(axis=1).mean() / 99)
