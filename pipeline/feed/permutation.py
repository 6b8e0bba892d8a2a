"""Permutations of range(n) by formula: the image of one index costs O(1), whatever n is.

A Feistel network over an even number of bits permutes a block of 4^k >= n indices; an index that lands outside
range(n) is sent through again until it lands inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). The block has fewer than 4n indices, so that takes less than 4 passes on average.
"""

import numpy as np
import numpy.typing as npt

from pipeline.keys import Key

Words = npt.NDArray[np.uint32]
LongWords = npt.NDArray[np.uint64]

_ROUNDS = 6


def permute(
    index: npt.NDArray[np.int64],
    size: npt.ArrayLike,
    key: Key,
) -> npt.NDArray[np.int64]:
    """Returns where the permutation of range(size) under `key` sends each index.

    `index` [...], `size` [...] (at most 2^62) and `key` [..., 2] broadcast, so one call serves many permutations.
    """
    size = np.asarray(size, np.int64)
    shape = np.broadcast_shapes(index.shape, size.shape, key.shape[:-1])
    image = np.broadcast_to(index, shape).astype(np.uint64).ravel()
    size = np.broadcast_to(size, shape).astype(np.uint64).ravel()
    words = np.broadcast_to(key, (*shape, 2)).reshape(-1, 2)
    assert (image < size).all()

    half = _count_half_bits(size)
    # A block that is too small would send some indices round for ever.
    assert (size <= np.uint64(1) << 2 * half).all()
    pending = np.arange(image.size)
    while pending.size:
        image[pending] = _encrypt(
            image[pending],
            half[pending],
            words[pending],
        )
        is_outside = image[pending] >= size[pending]
        pending = pending[is_outside]
    return image.astype(np.int64).reshape(shape)


def _count_half_bits(size: LongWords) -> LongWords:
    """Returns the least h with 4^h >= size, which is half the bit length of size - 1, rounded up."""
    last = size - np.uint64(1)
    # frexp gives the bit length of a double. In two pieces even numbers up to 2^62 are exact as doubles.
    high = last >> np.uint64(31)
    low = last & np.uint64(0x7FFFFFFF)
    _, high_bits = np.frexp(high.astype(np.float64))
    _, low_bits = np.frexp(low.astype(np.float64))
    bits = np.where(high > 0, high_bits + 31, low_bits)
    return ((bits + 1) // 2).astype(np.uint64)


def _encrypt(block: LongWords, half: LongWords, key: Words) -> LongWords:
    """Runs blocks of 2 * `half` bits through the Feistel network."""
    one = np.uint64(1)
    mask = ((one << half) - one).astype(np.uint32)
    left = (block >> half).astype(np.uint32)
    right = block.astype(np.uint32) & mask
    for number in range(_ROUNDS):
        # Each round has a key of its own, by Weyl's sequence with the golden ratio.
        constant = np.uint32(number * 0x9E3779B9 & 0xFFFFFFFF)
        word = key[:, number % 2] + constant
        mixed = _mix(right ^ word) & mask
        left, right = right, left ^ mixed
    return left.astype(np.uint64) << half | right.astype(np.uint64)


def _mix(word: Words) -> Words:
    """Maps 32-bit words one to one, so that each input bit flips half of the output bits (MurmurHash3's finaliser)."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
