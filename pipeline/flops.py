"""Floating-point operations: how many a network takes, and how many a device can do. What MFU is made of.

MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022, appendix B) is what training has to compute, three times
the forward pass, over what the device could have computed in that time. The network's operations are those of its
definition: what an implementation recomputes to save memory, or leaves out because nobody looks at it, makes no
difference.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of matrix products, by the name of the precision."""
BACKWARD = 2
"""A backward pass takes a product for the gradient of each factor, so twice what the forward pass takes."""

PEAK_FLOPS = {"H100, H200": 989e12, "A100": 312e12}
"""Of dense bf16 matrix products, by NVIDIA's data sheets."""
MFU = 0.30
"""Assumed of training on one node, where nothing was measured."""

MEASURED_S = 0.25
"""Long enough for others on the machine to be quiet for one product."""
SLOW_S = 0.005
"""Of a small product: a CPU without instructions for bf16 would take seconds for a large one, and reach no more."""


def training_flops(build: Callable[[], nn.Module], image_size: int) -> int:
    """Of one image of `image_size` pixels, two for each multiplication with its addition.

    `build` makes the network; it is made without memory for weights and results, as shapes are all it takes.
    """
    with torch.device("meta"):
        network, image = build().eval(), torch.empty(1, 3, image_size, image_size)
    # The math backend shows attention as matrix products, which the counter knows on any device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return (1 + BACKWARD) * counter.get_total_flops()


def matrix_flop_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second that the device reaches in products of large square matrices: the fastest in a quarter second."""
    side, seconds = 0, 0.0
    for side in (8192,) if device.type == "cuda" else (256, 1024):
        seconds = _fastest_product(side, device, dtype)
        if seconds > SLOW_S:
            break
    return 2 * side**3 / seconds


def _fastest_product(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest of the products of two matrices [side, side] that a quarter second allows."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        begin = _now(device)
        torch.matmul(left, right)
        return _now(device) - begin

    seconds()  # asks for memory, and chooses a kernel
    end, fastest = time.perf_counter() + MEASURED_S, seconds()
    while time.perf_counter() < end:
        fastest = min(fastest, seconds())
    return fastest


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
