"""Arrays on their way to the device, several in one copy, which nobody waits for.

arrays ──packed──▶ pinned bytes ──one copy, on the current stream──▶ bytes on the GPU ──views──▶ tensors
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_ALIGNMENT = 8  # bytes: the widest type's


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Returns tensors of the arrays' types and shapes. On a CPU they share the arrays' memory; on a GPU they are ready
    for the current stream, and for others that have waited for it."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack(arrays, pack(arrays, pin=True).to(device, non_blocking=True))


def pack(arrays: Sequence[Array], *, pin: bool) -> Tensor:
    """Returns the arrays' bytes, end to end, in pinned memory if `pin`."""
    *starts, end = _starts(arrays)
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    for array, start in zip(arrays, starts, strict=True):
        packed.numpy()[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return packed


def unpack(like: Sequence[Array], packed: Tensor) -> list[Tensor]:
    """Returns views of the bytes that `pack` laid out, as tensors of the types and shapes of the arrays in `like`."""
    return [
        packed[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(like, _starts(like)[:-1], strict=True)
    ]


def _starts(arrays: Sequence[Array]) -> list[int]:
    """Returns the offset of each array, and the size of all, in bytes."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + array.nbytes + -array.nbytes % _ALIGNMENT)
    return starts
