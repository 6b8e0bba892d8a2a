"""What the fork server imports, once for all ranks that tests start. See ranks.py."""

import gc
import importlib
import os
import tempfile
from pathlib import Path

# Read when the libraries are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch

torch.set_num_threads(1)

# Together they take a rank six seconds, which is more than the steps of most runs here.
for name in (
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch",
    "pipeline.job.training_job",
    "pipeline.track.sync.mirror",
    "pycocotools.cocoeval",
    "timm",
    "torchmetrics.classification",
    "torchvision",
):
    importlib.import_module(name)


def spare_ranks_their_start() -> None:
    """Does once what each rank would do, and what no result of a test depends on."""
    from pipeline import files, flops
    from pipeline.track import tracking_server
    from pipeline.train.import_deepspeed import prepare_deepspeed

    prepare_deepspeed()
    # How fast the processor is: half a second of products otherwise.
    flops.MEASURED_S = 0.02
    # MLflow makes a new database by two seconds of migrations. Here it is a copy of one that a process of its own has
    # made, because connections do not survive a fork.
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "mlflow.db")
        if os.fork() == 0:
            try:
                tracking_server.connect(f"sqlite:///{made}", create=True)
            finally:
                os._exit(0)
        os.wait()
        empty = made.read_bytes()
    tracking_server._create_database = lambda database: files.write(database, empty)


spare_ranks_their_start()

# So that ranks neither walk through what is imported here nor copy its pages.
gc.collect()
gc.freeze()
