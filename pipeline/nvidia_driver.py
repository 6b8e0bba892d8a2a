"""Asks NVIDIA's driver about this machine's GPUs, which works even where torch cannot use them."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import pynvml

OLDEST = {11: 450, 12: 525, 13: 580}
"""The oldest driver that a program works with, by the major version of the CUDA it was built for: NVIDIA's "CUDA
Compatibility", minor version compatibility."""
UNUSED_MEMORY = 0.9
"""The share of a GPU's memory that is free when no other process uses it. The driver itself takes less than a tenth."""


class Driver(NamedTuple):
    version: str
    """The version, such as 580.95.05."""
    num_gpus: int
    """The number of GPUs in the machine, whatever CUDA_VISIBLE_DEVICES says."""


def read_driver() -> Driver | None:
    """Returns the driver's version and number of GPUs; None on a machine without a working driver."""
    try:
        with _nvml():
            return Driver(pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None


def pci_bus_id(properties: Any) -> str:
    """Returns the name that identifies a GPU on its node, from torch's properties of it."""
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def gpus_in_use(gpu: str, free: int, total: int) -> str:
    """Returns a sentence: how much of a GPU's memory is free, and which processes use the rest.

    `gpu` is its `pci_bus_id`; `free` and `total` are in bytes.
    """
    users = ", ".join(f"pid {pid} ({_process_name(pid)})" for pid in _other_processes(gpu))
    # In a container the driver hides the processes of others.
    users = users or "a process that the driver does not name here"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free: used by {users}"


def _other_processes(gpu: str) -> list[int]:
    try:
        with _nvml():
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(gpu)
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return []
    return sorted({process.pid for process in processes} - {os.getpid()})


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    # The process is in another container, or has ended.
    except psutil.Error:
        return "unknown"


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()
