"""How far from a reference results may be on a GPU, where that is further than on a CPU."""

import torch

SUMS = 4.0
"""A GPU splits sums over thousands of threads and chooses kernels by shape, so ours and a reference's add up the same
fp32 numbers in orders that differ more than on a CPU. Nothing is rounded to TF32 (conftest.py). The
number is a guess, as these tests have not been run on a GPU yet."""


def of_sums(tolerance: float) -> float:
    """The tolerance of a comparison in fp32, given that of a CPU."""
    return tolerance * SUMS if torch.cuda.is_available() else tolerance
