"""Counter-based random draws by key: the only source of randomness outside weight initialisation.

    key(seed, STREAM, epoch, sample, …) ──▶ two 32-bit words that stand for these coordinates
    uniform(key, n), generator(key)     ──▶ numbers that depend on the key alone

A draw is a pure function of its coordinates, so no generator state is ever saved, and it does not matter which
rank draws, in which order, or how often. Everything is vectorised: coordinates broadcast like numpy arrays.

The cipher is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Key = Words
"""[..., 2]: the two words of a key."""


class Stream(enum.IntEnum):
    """The purpose of a draw. Streams with equal coordinates are independent. Values are part of the data format:
    renumbering one changes every run."""

    SHARDS = 1
    ROTATION = 2
    WINDOW = 3
    AUGMENT = 4
    MIX = 5
    DROP_PATH = 6
    MODULE = 7
    PACK = 8
    MIXTURE = 9
    SHOW = 10
    ERASE = 11


# The constants of Salmon et al.
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint32(0x9E3779B9)
_WEYL_1 = np.uint32(0xBB67AE85)
_ROUNDS = 10


def philox(counter: Words, key: Key) -> Words:
    """Encrypts 128-bit counters, [..., 4] words, under 64-bit keys, [..., 2] words. Leading axes broadcast."""
    shape = np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    counter = np.broadcast_to(counter, (*shape, 4))
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    # Slices, because numpy warns where scalars wrap around.
    k0 = key[..., :1]
    k1 = key[..., 1:]
    for _ in range(_ROUNDS):
        high0, low0 = _split(c0.astype(np.uint64) * _MULTIPLIER_0)
        high1, low1 = _split(c2.astype(np.uint64) * _MULTIPLIER_1)
        c0 = high1 ^ c1 ^ k0[..., 0]
        c1 = low1
        c2 = high0 ^ c3 ^ k1[..., 0]
        c3 = low0
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return np.stack([c0, c1, c2, c3], axis=-1)


def _split(values: npt.NDArray[np.uint64]) -> tuple[Words, Words]:
    """Returns the high and the low words of 64-bit values."""
    high = values >> np.uint64(32)
    low = values & np.uint64(0xFFFFFFFF)
    return high.astype(np.uint32), low.astype(np.uint32)


def key(seed: int, stream: Stream, *coordinates: npt.ArrayLike) -> Key:
    """Returns the key, [..., 2] words, of a stream at integer coordinates (each below 2^64; they broadcast)."""
    key = np.array([seed, stream], np.uint32)
    for coordinate in coordinates:
        key = fold(key, coordinate)
    return key


def fold(key: Key, coordinate: npt.ArrayLike) -> Key:
    """Returns the key, [..., 2] words, of one more coordinate."""
    # Through unsigned 64 bits, so that one function serves counts, ids and array shapes alike.
    value = np.asarray(coordinate).astype(np.uint64)
    high, low = _split(value)
    counter = np.zeros((*value.shape, 4), np.uint32)
    counter[..., 0] = low
    counter[..., 1] = high
    # Folding uses counters whose third word is 1; drawing uses 0, so a draw never repeats a key.
    counter[..., 2] = 1
    return philox(counter, key)[..., :2]


def bits(key: Key, count: int) -> Words:
    """Returns `count` random 32-bit words for each key: [..., 2] to [..., count]."""
    # A counter gives four words.
    blocks = -(-count // 4)
    counter = np.zeros((blocks, 4), np.uint32)
    counter[:, 0] = np.arange(blocks)
    words = philox(counter, key[..., None, :])
    words = words.reshape(*key.shape[:-1], blocks * 4)
    return words[..., :count]


def uniform(key: Key, count: int) -> npt.NDArray[np.float64]:
    """Returns `count` uniform numbers in [0, 1) for each key: [..., 2] to [..., count]."""
    return bits(key, count) * np.float64(2.0**-32)


def generator(key: Key) -> np.random.Generator:
    """Returns a numpy generator for one key, [2] words, where a distribution needs a changing number of draws."""
    number = int(key[0]) | int(key[1]) << 32
    return np.random.Generator(np.random.Philox(key=[number, 0]))


def torch_seed(key: Key) -> int:
    """Returns a seed for `torch.manual_seed`, for modules that draw by themselves (dropout)."""
    # torch's seeds have 63 bits.
    high = int(key[1]) & 0x7FFFFFFF
    return int(key[0]) | high << 32


def permutation(key: Key, size: int) -> npt.NDArray[Any]:
    """Returns a uniform permutation of range(size), in O(size) memory. feed/permutation.py permutes longer ranges."""
    return np.argsort(bits(key, size), kind="stable")
