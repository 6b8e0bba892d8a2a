"""Philox against its published vectors; keys as coordinates."""

import numpy as np
import pytest

from pipeline import keys
from pipeline.keys import Stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known-answer vectors of Random123, philox4x32 with 10 rounds.
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_matches_published_vectors(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([int(word, 16) for word in text.split()], np.uint32)

    assert (keys.philox(words(counter), words(key)) == words(expected)).all()


def test_key_does_not_depend_on_other_keys_in_array() -> None:
    together = keys.key(7, Stream.AUGMENT, 3, np.arange(100))
    alone = np.stack([keys.key(7, Stream.AUGMENT, 3, i) for i in range(100)])
    assert (together == alone).all()
    assert (keys.bits(together, 9) == np.stack([keys.bits(key, 9) for key in alone])).all()
    assert (keys.bits(together, 9)[:, :5] == keys.bits(together, 5)).all()


def test_every_coordinate_changes_the_key() -> None:
    seen = {
        tuple(keys.key(seed, stream, *coordinates).tolist())
        for seed in (0, 1)
        for stream in Stream
        for coordinates in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32,), (2**40, 1)]
    }
    assert len(seen) == 2 * len(Stream) * 8


def test_uniform_draws_are_uniformly_distributed() -> None:
    draws = keys.uniform(keys.key(0, Stream.MIX, np.arange(20_000)), 3)
    assert 0 <= draws.min() < draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    chi2 = ((counts - draws.size / 50) ** 2 / (draws.size / 50)).sum()
    assert chi2 < 94.9  # 99.99 % of chi-squared with 49 degrees of freedom
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03


def test_permutation_holds_every_index_once() -> None:
    assert sorted(keys.permutation(keys.key(1, Stream.PACK), 1000)) == list(range(1000))
