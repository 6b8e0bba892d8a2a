"""DeepSpeed, imported without what a training process has no use for."""

import importlib
import sys

__all__ = ["deepspeed"]

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
