"""How long a device works on a piece of code, without waiting for it."""

import time
from typing import Any

import torch


class DeviceTimer:
    """Sums up the time inside `with`: the device's own on a GPU, else the host's."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Returns the sum. Call it when something else has waited for the device: events have no time before that."""
        total = 0.0
        for began, ended in zip(self._marks[::2], self._marks[1::2], strict=True):
            if self._on_gpu:
                total += began.elapsed_time(ended) / 1000
            else:
                total += ended - began
        return total
