"""What the fake CUDA runtime has counted in this process, which has to run on it; see build.py."""

import contextlib
import ctypes
import dataclasses
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.ranks import ROOT

LIBRARY = ctypes.CDLL(os.environ["FAKECUDA"])
NAMES = (ctypes.c_char_p.in_dll(LIBRARY, "fake_names").value or b"").decode().split()

_PACKAGES = Path(sysconfig.get_path("purelib"))
_counts = (ctypes.c_long * len(NAMES)).in_dll(LIBRARY, "fake_counts")


@dataclasses.dataclass
class Counted:
    counts: dict[str, int]
    """By name, in the order of counts.h."""
    sites: Counter[str]
    """Synchronisations by kind and place: the innermost function of Python that is not torch's own."""


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Counts what happens inside, in all threads. The result is complete after it."""
    counted = Counted({}, Counter())

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_sync(what: int) -> None:
        counted.sites[f"{NAMES[what]} {_site(sys._getframe(1) if _has_caller() else None)}"] += 1

    hook = ctypes.c_void_p.in_dll(LIBRARY, "fake_on_sync")
    before = list(_counts)
    hook.value = ctypes.cast(on_sync, ctypes.c_void_p).value
    try:
        yield counted
    finally:
        hook.value = None
        counted.counts.update((name, now - then) for name, now, then in zip(NAMES, _counts, before, strict=True))


def _has_caller() -> bool:
    """Threads of autograd's own run no Python below the hook."""
    return sys._getframe(1).f_back is not None


def _site(frame: FrameType | None) -> str:
    while frame:
        path = Path(frame.f_code.co_filename)
        root = next((root for root in (_PACKAGES, ROOT) if path.is_relative_to(root)), None)
        if root and path.relative_to(root).parts[0] != "torch" and path != Path(__file__):
            return f"{path.relative_to(root)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "no function of Python"


@contextlib.contextmanager
def flags_read_as(value: bool) -> Iterator[None]:
    """What a bool read from the device is; else it is False."""
    with _set("fake_flag", value):
        yield


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Events that are recorded do not happen: all memory that waits for one is in use."""
    with _set("fake_busy", True):
        yield


@contextlib.contextmanager
def _set(name: str, value: bool) -> Iterator[None]:
    variable = ctypes.c_int.in_dll(LIBRARY, name)
    variable.value = value
    try:
        yield
    finally:
        variable.value = 0
