"""What the fork server imports, once for all ranks that tests start. See ranks.py."""

import os

# Read when the libraries are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch

import launch.job  # noqa: F401
import pipeline.track.registry  # noqa: F401

torch.set_num_threads(1)
