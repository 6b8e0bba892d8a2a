"""Counts the floating-point operations that a network takes, and measures how many a device can do.

MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022, appendix B) is the operations of training, three times
those of the forward pass, over those that the device could have done in that time. The network's operations are those
of its definition: what an implementation recomputes to save memory, or skips because nobody uses it, makes no
difference.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of matrix products by the name of the precision."""
BACKWARD = 2
"""The operations of a backward pass over those of a forward pass: it takes a product for each factor's gradient."""

PEAK_FLOPS = {"H100, H200": 989e12, "A100": 312e12}
"""FLOP a second of dense bf16 matrix products, from NVIDIA's data sheets."""
MFU = 0.30
"""The MFU that is assumed for training on one node, where nothing was measured."""

MEASURED_S = 0.25
"""How long products are measured: long enough for other processes to be idle during one of them."""
SLOW_S = 0.005
"""The time of a small product above which no large one is measured: a CPU without instructions for bf16 would take
seconds for it, and not be faster."""


def training_flops(build: Callable[[], nn.Module], image_size: int) -> int:
    """Returns the operations of training on one image of `image_size` pixels, two for each multiplication with its
    addition.

    `build` makes the network. It gets no memory for weights and results, because shapes are enough to count.
    """
    with torch.device("meta"):
        network = build().eval()
        image = torch.empty(1, 3, image_size, image_size)
    # The math backend shows attention as matrix products, which the counter knows on any device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return (1 + BACKWARD) * counter.get_total_flops()


def matrix_flop_s(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP a second that the device reaches in products of large square matrices: those of the fastest
    product in a quarter second."""
    if device.type == "cuda":
        side = 8192
        seconds = _time_product(side, device, dtype)
    else:
        side = 256
        seconds = _time_product(side, device, dtype)
        if seconds <= SLOW_S:
            side = 1024
            seconds = _time_product(side, device, dtype)
    return 2 * side**3 / seconds


def _time_product(
    side: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Returns the seconds of the fastest of the products of two matrices [side, side] that a quarter second allows."""
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)

    def time_once() -> float:
        begin = _read_clock(device)
        torch.matmul(left, right)
        return _read_clock(device) - begin

    # The first product allocates memory and chooses a kernel.
    time_once()
    end = time.perf_counter() + MEASURED_S
    fastest = time_once()
    while time.perf_counter() < end:
        fastest = min(fastest, time_once())
    return fastest


def _read_clock(device: torch.device) -> float:
    """Returns the time after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
