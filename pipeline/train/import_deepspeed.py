"""DeepSpeed, imported without what a training process has no use for."""

import importlib
import logging
import sys

__all__ = ["deepspeed", "prepare_deepspeed"]

if "mlflow" not in sys.modules:
    # DeepSpeed's autotuner, which is not used here, imports MLflow if it finds it, on every rank: 2.5 to 3.2 s of CPU
    # time, of the 3.1 to 3.8 s that `import deepspeed` takes after torch. Rank 0's Tracker imports it in a thread.
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]  # makes its import fail
    try:
        importlib.import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]

import deepspeed
import deepspeed.runtime.compiler
import deepspeed.runtime.zero.config
import deepspeed.utils

from pipeline.log import shows_details


def prepare_deepspeed() -> None:
    """Has `deepspeed.initialize` skip what takes time and is not used, and log to standard error."""
    _log_to_stderr()
    _import_muon_without_compiling()
    # The first process group of CPU ranks has DeepSpeed build its operator for shared memory if it seems to be
    # compatible: 58 s with g++, where no cache holds it. All communication here goes through torch.distributed.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]


def _import_muon_without_compiling() -> None:
    # DeepSpeed imports its Muon optimiser at every start, and decorates three functions there with torch.compile. That
    # takes 2.3 s of CPU time on every rank, for functions that are never called. DeepSpeed has no setting for it.
    compiler = deepspeed.runtime.compiler
    compile_decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_decorator


def _log_to_stderr() -> None:
    # DeepSpeed logs to standard output, whose last line is a command's result.
    logger = deepspeed.utils.logger
    if not shows_details():
        logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
