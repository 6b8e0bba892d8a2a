"""Counter-based random draws by key: the only source of randomness outside weight initialisation.

    key(seed, STREAM, epoch, sample, …) ──▶ two 32-bit words that stand for these coordinates
    uniform(key, n), generator(key)     ──▶ numbers that depend on nothing else

A draw is a pure function of its coordinates, so no generator state is ever saved, and it does not matter which
rank draws, in which order, or how often. Everything is vectorised: coordinates broadcast like numpy arrays.

The cipher is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import enum
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Key = npt.NDArray[np.uint32]  # [..., 2]


class Stream(enum.IntEnum):
    """What a draw is for. Streams with equal coordinates are independent. Values are part of the data format:
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


_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_ROUNDS = 10


def philox(counter: npt.NDArray[np.uint32], key: Key) -> npt.NDArray[np.uint32]:
    """Encrypt 128-bit counters, [..., 4] words, under 64-bit keys, [..., 2] words. Leading axes broadcast."""
    shape = np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    c0, c1, c2, c3 = (np.broadcast_to(counter[..., i], shape) for i in range(4))
    k0, k1 = key[..., :1], key[..., 1:]  # slices, because numpy warns where scalars wrap around
    for _ in range(_ROUNDS):
        product0 = c0.astype(np.uint64) * _MULTIPLIERS[0]
        product1 = c2.astype(np.uint64) * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HIGH).astype(np.uint32) ^ c1 ^ k0[..., 0],
            (product1 & _LOW).astype(np.uint32),
            (product0 >> _HIGH).astype(np.uint32) ^ c3 ^ k1[..., 0],
            (product0 & _LOW).astype(np.uint32),
        )
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack([c0, c1, c2, c3], axis=-1)


def key(seed: int, stream: Stream, *coordinates: npt.ArrayLike) -> Key:
    """The key, [..., 2] words, of a stream at the given integer coordinates (each below 2^64; they broadcast)."""
    return functools.reduce(fold, coordinates, np.array([seed, stream], np.uint32))


def fold(key: Key, coordinate: npt.ArrayLike) -> Key:
    """The key, [..., 2] words, of one more coordinate."""
    # Through unsigned 64 bits, so that one function serves counts, ids and array shapes alike.
    value = np.asarray(coordinate).astype(np.uint64)
    counter = np.zeros((*value.shape, 4), np.uint32)
    counter[..., 0] = (value & _LOW).astype(np.uint32)
    counter[..., 1] = (value >> _HIGH).astype(np.uint32)
    # Folding uses counters whose third word is 1; drawing uses 0, so a draw never repeats a key.
    counter[..., 2] = 1
    return philox(counter, key)[..., :2]


def bits(key: Key, count: int) -> npt.NDArray[np.uint32]:
    """`count` random 32-bit words for each key: [..., 2] to [..., count]."""
    blocks = -(-count // 4)
    counter = np.zeros((blocks, 4), np.uint32)
    counter[:, 0] = np.arange(blocks)
    words = philox(counter, key[..., None, :])
    return words.reshape(*key.shape[:-1], blocks * 4)[..., :count]


def uniform(key: Key, count: int) -> npt.NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each key: [..., 2] to [..., count]."""
    return bits(key, count) * np.float64(2.0**-32)


def generator(key: Key) -> np.random.Generator:
    """A numpy generator for one key, [2] words, where a distribution needs a changing number of draws."""
    return np.random.Generator(np.random.Philox(key=[int(key[0]) | int(key[1]) << 32, 0]))


def torch_seed(key: Key) -> int:
    """A seed for `torch.manual_seed`, for modules that draw by themselves (dropout)."""
    return int(key[0]) | (int(key[1]) & 0x7FFFFFFF) << 32


def permutation(key: Key, size: int) -> npt.NDArray[Any]:
    """A uniform permutation of range(size) in O(size) memory. For orders too long for that see feed/permutation.py."""
    return np.argsort(bits(key, size), kind="stable")
