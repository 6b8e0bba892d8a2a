"""What the fork server imports, once for all ranks that tests start. See ranks.py."""

import gc
import importlib
import os

# Read when the libraries are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch

torch.set_num_threads(1)

# Together they take a rank six seconds, which is more than the steps of most runs here.
for name in (
    "deepspeed",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch",
    "pycocotools.cocoeval",
    "timm",
    "torchmetrics.classification",
    "torchvision",
):
    importlib.import_module(name)

# So that ranks neither walk through what is imported here nor copy its pages.
gc.collect()
gc.freeze()
