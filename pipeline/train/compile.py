"""torch.compile, a block at a time.

A network's blocks are alike, so a few graphs serve all of them (PVT: one a stage, and one for the last block), where
compiling the whole network would take minutes. What lies between them, stems, norms and heads, is little and stays as
it is.
"""

import os
import shutil
from collections.abc import Iterator

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


def compile_blocks(network: nn.Module, *, sizes_vary: bool = False, deterministic: bool = False) -> None:
    """Have each block of `network` compiled when it is first called, for any size of its input if `sizes_vary`.

    Kernels are cached on disk, in $TORCHINDUCTOR_CACHE_DIR or a private folder: torch runs what it finds there.
    Raises InputError where that folder is somebody else's, for a network without blocks, and without a C++ compiler.
    """
    if not any(map(shutil.which, ((os.environ.get("CXX") or "g++").split()[0], "clang++"))):
        raise InputError("engine.compile: torch.compile needs g++, and it is not on the PATH; install it or set CXX")
    found = list(blocks(network))
    if not found:
        raise InputError(f"engine.compile: {type(network).__name__} is not made of lists of blocks; leave it out")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(files.private_folder("pvt-kernels"))
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._inductor.config.deterministic = deterministic  # no choosing of kernels by the clock
    for block in found:
        block.compile(dynamic=sizes_vary)
