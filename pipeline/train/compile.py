"""torch.compile, a block at a time.

A network's blocks are alike, so a few graphs serve all of them (PVT: one for each stage, and one for the last block),
where compiling the whole network would take minutes. Stems, norms and heads lie between them; they take little time and
are not compiled.
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
"""The most graphs of one kind of block: each of its shapes, dtypes and modes has its own. torch's limit is 8."""


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the innermost entries of a network's lists and sequences that have submodules themselves."""
    for module in network.children():
        inner = list(blocks(module))
        yield from inner
        is_entry = isinstance(network, nn.ModuleList | nn.Sequential)
        if is_entry and not inner and any(module.children()):
            yield module


def require_compiler(device_type: str, setting: str) -> None:
    """Raises InputError where torch.compile lacks what it needs for this kind of device, on behalf of a setting.

    For a CPU it writes C++. For a GPU Triton needs no C++ compiler, but it builds a launcher in C. Both include
    Python.h.
    """
    lacks, packages = [], []
    if device_type == "cuda":
        variable, gnu, clang = "CC", "gcc", "clang"
    else:
        variable, gnu, clang = "CXX", "g++", "clang++"
    command = os.environ.get(variable) or gnu
    # Options may follow the program, as in CC="ccache gcc".
    program = command.split()[0]
    if not shutil.which(program) and not shutil.which(clang):
        lacks.append(f"{gnu} or {clang} on the PATH, or in {variable}")
        packages.append(gnu)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        lacks.append(str(header))
        packages.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks.append("Python's package triton")
        packages.append("triton")
    if lacks:
        host = os.uname().nodename
        raise InputError(
            f"{setting}: torch.compile for {device_type} needs what {host} lacks: {'; '.join(lacks)}: "
            f"install {', '.join(packages)} (Debian's names), or remove the setting"
        )


def compile_blocks(network: nn.Module, *, sizes_vary: bool = False, deterministic: bool = False) -> None:
    """Has each block of `network` compiled when it is first called, for any size of its input if `sizes_vary`.

    Kernels are cached on disk, in $TORCHINDUCTOR_CACHE_DIR or a private folder. Raises InputError where that folder is
    somebody else's, and for a network without blocks.
    """
    network_blocks = list(blocks(network))
    if not network_blocks:
        raise InputError(f"engine.compile: {type(network).__name__} is not made of lists of blocks: remove the setting")
    # torch runs the machine code that it finds in the cache, so nobody else may write there.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(files.private_folder("pvt-kernels"))
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    # Else kernels are chosen by how long they take.
    torch._inductor.config.deterministic = deterministic
    for block in network_blocks:
        block.compile(dynamic=sizes_vary)
