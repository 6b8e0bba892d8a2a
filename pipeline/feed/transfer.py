"""Copies arrays to the device, several in one copy, which nobody waits for.

arrays ──packed──▶ pinned bytes ──one copy, on the current stream──▶ bytes on the GPU ──views──▶ tensors
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# In bytes: that of the widest type.
_ALIGNMENT = 8


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Returns tensors of the arrays' types and shapes. On a CPU they share the arrays' memory; on a GPU they are ready
    for the current stream, and for others that have waited for it."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # Only a copy from pinned memory runs without the host waiting for it.
    packed = pack(arrays, pin=True)
    return unpack(arrays, packed.to(device, non_blocking=True))


def pack(arrays: Sequence[Array], *, pin: bool) -> Tensor:
    """Returns the arrays' bytes, end to end, in pinned memory if `pin`."""
    *offsets, size = _compute_offsets(arrays)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    target = packed.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        values = np.frombuffer(array.tobytes(), np.uint8)
        target[offset : offset + array.nbytes] = values
    return packed


def unpack(like: Sequence[Array], packed: Tensor) -> list[Tensor]:
    """Returns views of the bytes that `pack` laid out, as tensors of the types and shapes of the arrays in `like`."""
    *offsets, _ = _compute_offsets(like)
    tensors = []
    for array, offset in zip(like, offsets, strict=True):
        dtype = torch.from_numpy(array).dtype
        stored = packed[offset : offset + array.nbytes]
        tensors.append(stored.view(dtype).view(array.shape))
    return tensors


def _compute_offsets(arrays: Sequence[Array]) -> list[int]:
    """Returns the offset of each array, and the size of all, in bytes."""
    offsets = [0]
    for array in arrays:
        end = offsets[-1] + array.nbytes
        padding = -array.nbytes % _ALIGNMENT
        offsets.append(end + padding)
    return offsets
