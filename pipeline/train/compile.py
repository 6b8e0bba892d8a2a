"""torch.compile, a block at a time.

A network's blocks are alike, so a few graphs serve all of them (PVT: one a stage, and one for the last block), where
compiling the whole network would take minutes. What lies between them, stems, norms and heads, is little and stays as
it is.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from pipeline import files
from pipeline.errors import InputError

_MOST_GRAPHS = 64
"""Of one kind of block: each of its shapes, dtypes and modes has its own. torch gives up after 8."""


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The innermost entries of a network's lists and sequences that are made of parts themselves."""
    for module in network.children():
        inner = list(blocks(module))
        yield from inner
        if not inner and isinstance(network, nn.ModuleList | nn.Sequential) and any(module.children()):
            yield module


def require_compiler(device_type: str, setting: str) -> None:
    """Raises InputError where torch.compile lacks what it needs for this kind of device, on behalf of a setting.

    For a CPU it writes C++; for a GPU Triton does without, but it builds a launcher in C. Both include Python.h.
    """
    lacks, packages = [], []
    if device_type == "cuda":
        variable, chosen, names = "CC", os.environ.get("CC"), ("gcc", "clang")
    else:
        variable, chosen, names = "CXX", os.environ.get("CXX"), ("g++", "clang++")
    if not any(map(shutil.which, ((chosen or names[0]).split()[0], *names[1:]))):
        lacks.append(f"{names[0]} or {names[1]} on the PATH, or in {variable}")
        packages.append(names[0])
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        lacks.append(str(header))
        packages.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks.append("Python's package triton")
        packages.append("triton")
    if lacks:
        raise InputError(
            f"{setting}: torch.compile for {device_type} needs what {os.uname().nodename} lacks: {'; '.join(lacks)}: "
            f"install {', '.join(packages)} (Debian's names), or do without the setting"
        )


def compile_blocks(network: nn.Module, *, sizes_vary: bool = False, deterministic: bool = False) -> None:
    """Have each block of `network` compiled when it is first called, for any size of its input if `sizes_vary`.

    Kernels are cached on disk, in $TORCHINDUCTOR_CACHE_DIR or a private folder: torch runs what it finds there.
    Raises InputError where that folder is somebody else's, and for a network without blocks.
    """
    found = list(blocks(network))
    if not found:
        raise InputError(f"engine.compile: {type(network).__name__} is not made of lists of blocks; leave it out")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(files.private_folder("pvt-kernels"))
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._inductor.config.deterministic = deterministic  # no choosing of kernels by the clock
    for block in found:
        block.compile(dynamic=sizes_vary)
