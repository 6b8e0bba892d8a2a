"""A safetensors file in host memory, filled in place: the copy that training waits for is the only one made.

    tensors on the device ──fill──▶ [ header | values | values | … ] ──▶ hashed and written as it stands

The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, the header's length; the header, JSON
padded with spaces; the tensors' values end to end, at the offsets that the header gives.
"""

import json
from collections.abc import Iterator, Mapping

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
        # Wide types first, so that every tensor is aligned; then as they lie in memory, to copy neighbours as one.
        allocations = {where: number for number, where in enumerate(dict.fromkeys(map(_allocation, like.values())))}
        names = sorted(
            like,
            key=lambda name: (
                -like[name].element_size(),
                allocations[_allocation(like[name])],
                like[name].storage_offset(),
                name,
            ),
        )
        header, offset = {}, 0
        for name in names:
            tensor = like[name]
            end = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _TYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        # Filled, so that the first save does not wait for the system to find the memory.
        self._bytes = torch.empty(start + offset, dtype=torch.uint8, pin_memory=pin).fill_(0)
        self._bytes[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._places = {name: tuple(start + at for at in header[name]["data_offsets"]) for name in names}
        self._addresses: list[int] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values. On a GPU they are there once its stream has been waited for."""
        sources = [tensors[name] for name in self._places]
        # Planned once for tensors that stay where they are: planning takes as long as some copies do.
        addresses = [source.data_ptr() for source in sources]
        if addresses != self._addresses:
            self._addresses, self._copies = addresses, list(self._plan(sources))
        for source, place in self._copies:
            place.copy_(source, non_blocking=True)

    def _plan(self, sources: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What to copy where. Tensors that follow on each other in memory as in the file are copied as one: thousands
        of copies cost more than their bytes."""
        places = list(self._places.values())
        first = 0
        for last, source in enumerate(sources):
            if last + 1 < len(sources) and _is_followed_by(source, sources[last + 1]):
                continue
            run = self._bytes[places[first][0] : places[last][1]].view(source.dtype)
            if first == last:
                yield source.detach(), run.view(source.shape)
            else:
                yield sources[first].detach().as_strided(run.shape, (1,)), run
            first = last + 1

    def data(self) -> memoryview:
        """The whole file."""
        return self._bytes.numpy().data


def _allocation(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_followed_by(tensor: Tensor, other: Tensor) -> bool:
    return (
        _allocation(tensor) == _allocation(other)
        and tensor.data_ptr() + tensor.numel() * tensor.element_size() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.is_contiguous()
        and other.is_contiguous()
    )
