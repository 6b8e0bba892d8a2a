"""What the fork server imports, once for all ranks that tests start. See ranks.py."""

import os

# Read when the libraries are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import gc

import mlflow.pyfunc
import mlflow.store.model_registry.sqlalchemy_workspace_store
import mlflow.store.tracking.sqlalchemy_workspace_store  # noqa: F401
import torch

torch.set_num_threads(1)

# So that ranks neither walk through what is imported here nor copy its pages.
gc.collect()
gc.freeze()
