"""Saves checkpoints on demand, each in a fresh process, so that a tracer can crash it; see test_crash.py.

    standard input ── "FOLDER STEP\n" ──▶ server ──fork──▶ a process that waits for one more byte, then saves and ends
    standard output ◀── "PID\n", "EXIT CODE\n" ── server

What takes seconds, importing and building an engine, is done once, and so is what needs threads of the libraries, which
do not survive a fork: Adam's moments come about in a step.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import world
from pipeline.config import Config
from pipeline.tasks.classify import ClassificationTask
from pipeline.train.checkpoint import Checkpoints, Retention, State
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.saver import Saver
from tests.batches import batch_of

IDENTITY: dict[str, Any] = {"model": "linear"}
NUM_CLASSES = 10
SIZE_PX = 8

PR_SET_PTRACER, ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)


def build_engine(here: world.World) -> Engine:
    """Of the smallest network there is: what is saved does not depend on its size."""
    config = Config.model_validate(
        {
            "run": {"name": "crash"},
            "model": {"name": "linear"},
            "image": {"size": SIZE_PX},
            "data": {"train": "unused"},
            "optim": {"lr": 1e-3},
            "train": {"length": "1 step", "global_batch_size": 48},
            "engine": {"zero_stage": 0, "precision": "fp32"},
        }
    )
    images, targets = torch.zeros(2, 3, SIZE_PX, SIZE_PX), torch.zeros(2, NUM_CLASSES)
    batch = batch_of(images, targets, weights=torch.zeros(2))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE_PX**2, NUM_CLASSES))
    task = ClassificationTask(network, [str(label) for label in range(NUM_CLASSES)])
    engine = Engine(config, task, here, lambda step: [batch])
    assert list(engine.fragments())
    return engine


def save(engine: Engine, here: world.World, folder: Path, step: int) -> None:
    """As a started run would: clear away what a crash has left, save, and keep the newest checkpoint alone."""
    checkpoints = Checkpoints(folder, here, IDENTITY)
    checkpoints.sweep()
    saver = Saver(checkpoints, Retention(last=1, best=0), engine, Ema(engine, 0.99), here)
    saver.save(State(step=step), safe_step=step)
    assert saver.finish() == checkpoints.path(step)
    saver.close()


def lines() -> Iterator[str]:
    """Of standard input, read byte by byte: what follows a line is for the child."""
    line = b""
    while byte := os.read(0, 1):
        line += byte
        if byte == b"\n":
            yield line.decode().rstrip("\n")
            line = b""


def main() -> None:
    here = world.start()
    engine = build_engine(here)
    # Some kernels let nobody but a parent trace a process.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
    print("ready", flush=True)
    for line in lines():
        folder, step = line.rsplit(" ", 1)
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
            os.read(0, 1)
            save(engine, here, Path(folder), int(step))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
