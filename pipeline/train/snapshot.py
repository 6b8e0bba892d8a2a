"""A safetensors file in host memory, filled in place: the copy that training waits for is the only one made.

    tensors on the device ──fill──▶ [ header | values | values | … ] ──▶ hashed and written as it stands

The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, the header's length; the header, JSON
padded with spaces; the tensors' values end to end, at the offsets that the header gives.
"""

import json
from collections.abc import Mapping

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
        # Wide types first, so that every tensor is aligned.
        names = sorted(like, key=lambda name: (-like[name].element_size(), name))
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
        self._views = {}
        for name in names:
            first, end = header[name]["data_offsets"]
            self._views[name] = self._bytes[start + first : start + end].view(like[name].dtype).view(like[name].shape)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values. On a GPU they are there once its stream has been waited for."""
        sources = [tensors[name] for name in self._views]
        # One call, because thousands of them take as long as the copying.
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            list(self._views.values()), sources, non_blocking=True
        )

    def data(self) -> memoryview:
        """The whole file."""
        return self._bytes.numpy().data
