"""The order's arithmetic: bijections, coverage, and the same global batches on every world."""

import dataclasses
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.order import Order, deal, padding_waste
from pipeline.feed.permute import permute
from pipeline.keys import Stream


def cut(micro_batch_size: int | None, *, pairs: bool = False) -> Config:
    """As much of a Config as `deal` reads."""
    train, mix = SimpleNamespace(micro_batch_size=micro_batch_size), SimpleNamespace(active=pairs)
    return cast(Config, SimpleNamespace(train=train, mix=mix))


def near_powers_of_two() -> list[int]:
    return sorted({max(1, 2**k + d) for k in range(11) for d in (-1, 0, 1)})


@pytest.mark.parametrize("size", near_powers_of_two())
def test_permute_is_a_bijection(size: int) -> None:
    for seed in range(3):
        image = permute(np.arange(size), size, keys.key(seed, Stream.WINDOW))
        assert sorted(image) == list(range(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 + 1, 10**12, 2**60])
def test_permute_stays_inside_and_apart_at_great_sizes(size: int) -> None:
    index = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    image = permute(index, size, keys.key(0, Stream.WINDOW))
    assert ((image >= 0) & (image < size)).all()
    assert len(set(image.tolist())) == len(index)


def test_permute_looks_uniform() -> None:
    # Where each of 8 places goes, over 8,000 keys, against the flat expectation of 1,000 in each of 64 cells.
    images = permute(np.arange(8)[None], 8, keys.key(0, Stream.WINDOW, np.arange(8000))[:, None])
    counts = np.array([np.bincount(images[:, place], minlength=8) for place in range(8)])
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 94.6  # 99.99 % of chi-squared with 49 degrees of freedom


@st.composite
def orders(draw: st.DrawFn) -> Order:
    shards = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=12)))
    lanes, share = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    batch = lanes * share
    if shards.sum() < batch:
        shards = np.append(shards, batch)
    return Order(
        shards,
        seed=draw(st.integers(0, 2**32 - 1)),
        global_batch_size=batch,
        lanes=lanes,
        shuffle_window=draw(st.integers(1, 64)),
    )


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 3))
def test_an_epoch_takes_each_sample_once_but_for_the_tail(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    steps = [order.samples(first + k) for k in range(order.steps_per_epoch)]
    taken = np.concatenate([samples.id for samples in steps])
    assert len(set(taken.tolist())) == len(taken) == order.steps_per_epoch * order.global_batch_size
    assert order.num_samples - len(taken) < order.global_batch_size
    assert all((samples.position == np.arange(order.global_batch_size)).all() for samples in steps)
    assert all(samples.epoch == epoch for samples in steps)


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 200))
def test_rows_belong_to_their_shards(order: Order, step: int) -> None:
    samples = order.samples(step)
    sizes = order._shard_samples
    assert ((samples.row >= 0) & (samples.row < sizes[samples.shard])).all()
    assert (samples.id == (np.cumsum(sizes) - sizes)[samples.shard] + samples.row).all()


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(1, 8), st.integers(1, 9), st.booleans(), st.integers(0, 100))
def test_every_world_deals_out_the_same_global_batch(
    order: Order, world: int, micro: int, pairs: bool, step: int
) -> None:
    if world > order.lanes:
        with pytest.raises(InputError, match="ranks"):
            deal(order, 0, world, cut(micro))
        return
    parts = [deal(order, rank, world, cut(micro, pairs=pairs)) for rank in range(world)]
    assert len({(part.accumulation, part.micro_batch_size) for part in parts}) == 1
    assert all(part.samples <= part.accumulation * part.micro_batch_size for part in parts)
    assert parts[0].micro_batch_size <= micro + (pairs and micro % 2)
    assert not (pairs and parts[0].micro_batch_size % 2)
    dealt = np.concatenate([order.samples(step, part.lanes).id for part in parts])
    assert (dealt == order.samples(step).id).all()


def test_over_epochs_the_tail_falls_on_all_samples() -> None:
    # One shard and a tail of 3: without the rotation the same samples would always be left out.
    order = Order(np.array([35]), seed=0, global_batch_size=32, lanes=4, shuffle_window=1)
    left_out = [set(range(35)) - set(order.samples(epoch).id.tolist()) for epoch in range(200)]
    assert set.union(*left_out) == set(range(35))


def test_a_rank_of_four_reads_a_quarter_of_the_shards() -> None:
    order = Order(np.full(400, 25), seed=0, global_batch_size=200, lanes=8, shuffle_window=100)
    part = deal(order, 1, 4, cut(None))
    opened = {s for k in range(order.steps_per_epoch) for s in order.samples(k, part.lanes).shard.tolist()}
    assert len(opened) <= 102


def test_padding_is_counted() -> None:
    order = Order(np.array([100]), seed=0, global_batch_size=48, lanes=12, shuffle_window=1)
    assert padding_waste(order, 4, cut(None)) == 0
    assert padding_waste(order, 5, cut(None)) == pytest.approx(1 - 48 / (5 * 12))
    assert padding_waste(order, 1, cut(20)) == 0  # three times 16
    assert padding_waste(order, 1, cut(10, pairs=True)) == pytest.approx(1 - 48 / 50)


def test_seeking_is_independent_of_what_came_before() -> None:
    make = lambda: Order(np.array([40, 60]), seed=3, global_batch_size=12, lanes=4, shuffle_window=16)  # noqa: E731
    walked = make()
    for step in range(50):
        walked.samples(step)
    for name, value in dataclasses.asdict(walked.samples(50)).items():
        assert np.array_equal(value, getattr(make().samples(50), name))


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="31 samples"):
        Order(np.array([31]), seed=0, global_batch_size=32, lanes=4, shuffle_window=1)
