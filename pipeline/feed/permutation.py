"""Permutations of range(n) by formula: the image of one index costs O(1), whatever n is.

A Feistel network over an even number of bits permutes a block of 4^k >= n indices; an index that lands outside
range(n) is sent through again until it lands inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). The block has fewer than 4n indices, so that takes less than 4 passes on average.
"""

import numpy as np
import numpy.typing as npt

from pipeline.keys import Key

_ROUNDS = 6


def permute(index: npt.NDArray[np.int64], size: npt.ArrayLike, key: Key) -> npt.NDArray[np.int64]:
    """Where the permutation of range(size) under `key` sends each index.

    `index` [...], `size` [...] (at most 2^62) and `key` [..., 2] broadcast, so one call serves many permutations.
    """
    size = np.asarray(size, np.int64)
    shape = np.broadcast_shapes(index.shape, size.shape, key.shape[:-1])
    image = np.broadcast_to(index, shape).astype(np.uint64).ravel()
    size = np.broadcast_to(size, shape).astype(np.uint64).ravel()
    words = np.broadcast_to(key, (*shape, 2)).reshape(-1, 2)
    assert (image < size).all()

    half = _half_bits(size)
    # A block that is too small would send some indices round for ever.
    assert (size <= np.uint64(1) << 2 * half).all()
    pending = np.arange(image.size)
    while pending.size:
        image[pending] = _feistel(image[pending], half[pending], words[pending])
        pending = pending[image[pending] >= size[pending]]
    return image.astype(np.int64).reshape(shape)


def _half_bits(size: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The least h with 4^h >= size. frexp is exact here: it is asked for the bit length of size - 1 < 2^62, in two
    pieces that doubles hold exactly."""
    last = size - np.uint64(1)
    high, low = last >> np.uint64(31), last & np.uint64(0x7FFFFFFF)
    bits = np.where(high > 0, np.frexp(high.astype(np.float64))[1] + 31, np.frexp(low.astype(np.float64))[1])
    return ((bits + 1) // 2).astype(np.uint64)


def _feistel(
    block: npt.NDArray[np.uint64], half: npt.NDArray[np.uint64], key: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint64]:
    mask = ((np.uint64(1) << half) - np.uint64(1)).astype(np.uint32)
    left, right = (block >> half).astype(np.uint32), block.astype(np.uint32) & mask
    for number in range(_ROUNDS):
        word = key[:, number % 2] + np.uint32(number * 0x9E3779B9 & 0xFFFFFFFF)
        left, right = right, left ^ (_mix(right ^ word) & mask)
    return left.astype(np.uint64) << half | right.astype(np.uint64)


def _mix(word: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A bijection of 32-bit words in which each input bit flips half of the output bits (MurmurHash3's finaliser)."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
