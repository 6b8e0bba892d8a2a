"""A safetensors file in host memory, filled in place: the copy that training waits for is the only one made.

    tensors on the device ──fill──▶ [ header | values | values | … ] ──▶ hashed and written as it stands

The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, the header's length; the header, JSON
padded with spaces; the tensors' values end to end, at the offsets that the header gives.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Snapshot:
    """The file's bytes, for tensors whose names, types and shapes stay the same. `pin` allows faster copies off a
    GPU."""

    def __init__(self, like: Mapping[str, Tensor], *, pin: bool) -> None:
        names = _order(like)
        entries: dict[str, dict[str, Any]] = {}
        offset = 0
        for name in names:
            tensor = like[name]
            end = offset + tensor.numel() * tensor.element_size()
            entries[name] = {
                "dtype": _TYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        # Padded, so that the values begin at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        start = len(header)
        # Filled, so that the first save does not wait for the system to find the memory.
        self._bytes = torch.empty(start + offset, dtype=torch.uint8, pin_memory=pin).fill_(0)
        self._bytes[:start] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._ranges: dict[str, tuple[int, int]] = {}
        """Where the values of each tensor begin and end in the file."""
        for name in names:
            first, last = entries[name]["data_offsets"]
            self._ranges[name] = (start + first, start + last)
        self._addresses: list[int] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values. On a GPU they are there once its stream has been waited for."""
        sources = [tensors[name] for name in self._ranges]
        # Planned once for tensors that stay at their addresses: planning takes as long as some copies do.
        addresses = [source.data_ptr() for source in sources]
        if addresses != self._addresses:
            self._addresses = addresses
            self._copies = list(self._plan_copies(sources))
        for source, destination in self._copies:
            destination.copy_(source, non_blocking=True)

    def _plan_copies(self, sources: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields sources and destinations.

        Tensors that follow on each other in memory as in the file are copied as one: thousands of copies cost more than
        their bytes.
        """
        ranges = list(self._ranges.values())
        first = 0
        for last, source in enumerate(sources):
            is_last = last + 1 == len(sources)
            if not is_last and _is_followed_by(source, sources[last + 1]):
                continue
            start, _ = ranges[first]
            _, end = ranges[last]
            destination = self._bytes[start:end].view(source.dtype)
            if first == last:
                yield source.detach(), destination.view(source.shape)
            else:
                yield sources[first].detach().as_strided(destination.shape, (1,)), destination
            first = last + 1

    def data(self) -> memoryview:
        """Returns the whole file."""
        return self._bytes.numpy().data


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names in the file's order: wide types first, so that every tensor is aligned; then as the tensors lie
    in memory, so that neighbours can be copied as one."""
    allocations: dict[int, int] = {}
    for tensor in tensors.values():
        allocations.setdefault(_allocation(tensor), len(allocations))

    def rank(name: str) -> tuple[int, int, int, str]:
        tensor = tensors[name]
        allocation = allocations[_allocation(tensor)]
        return -tensor.element_size(), allocation, int(tensor.storage_offset()), name

    return sorted(tensors, key=rank)


def _allocation(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_followed_by(tensor: Tensor, other: Tensor) -> bool:
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return (
        _allocation(tensor) == _allocation(other)
        and end == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.is_contiguous()
        and other.is_contiguous()
    )
