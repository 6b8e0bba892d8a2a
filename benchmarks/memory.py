"""How much memory a detector's training step needs, with and without activation checkpointing.

python -m benchmarks.memory [MODEL …] [--task mask_rcnn] [--size 800x1333] [--precision bf16]

    for each model, without and with:  a process of its own: network, one image ─▶ forward, backward ─▶ peak, seconds

An image with 10 objects of 80 classes, on the GPU if there is one. `peak` is the most memory that was allocated there,
or else resident in the process: fp32 weights and gradients, activations, and on a CPU what Python and PyTorch take by
themselves. `before` is the same with the network built. An optimiser's state comes on top. Prints a table to standard
error.
"""

import argparse
import functools
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import timm
import torch
from torch import nn

from benchmarks import report
from pipeline import cli
from pvt.dense import backbone
from pvt.detector import Detector, Extent, Objects
from pvt.detr import Detr
from pvt.mask_rcnn import MaskRcnn
from pvt.retinanet import RetinaNet

TASKS: dict[str, Callable[[nn.Module, int], Detector]] = {"retinanet": RetinaNet, "mask_rcnn": MaskRcnn, "detr": Detr}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
NUM_CLASSES, NUM_OBJECTS = 80, 10
KIB, MIB = 2**10, 2**20


def main() -> dict[str, Any]:
    arguments = _arguments()
    print("| model | checkpointing | before, MiB | peak, MiB | step, s |\n|---|---|---|---|---|", file=sys.stderr)
    cases, context = [], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])  # whose imports take seconds
    for model in arguments.models:
        for recompute in (False, True):
            # A process's peak is that of its whole life.
            with ProcessPoolExecutor(1, mp_context=context) as process:
                case = functools.partial(measure, model, arguments.task, arguments.size, arguments.precision, recompute)
                measured = process.submit(case).result()
            cases.append({"model": model, "checkpointing": recompute, **measured})
            figures = " | ".join(f"{value:,}" for value in measured.values())
            print(f"| {model} | {'with' if recompute else 'without'} | {figures} |", file=sys.stderr, flush=True)
    about = {"task": arguments.task, "size": arguments.size, "precision": arguments.precision}
    result = {**about, "cases": cases, "threads": torch.get_num_threads()}
    return report.finish("memory", result, arguments.out, device="cuda" if torch.cuda.is_available() else "cpu")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["pvt_large"], metavar="MODEL", help="of timm, such as resnet50")
    parser.add_argument("--task", choices=TASKS, default="mask_rcnn")
    parser.add_argument("--size", type=_size, default=(800, 1333), metavar="HxW", help="of the image, in pixels")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of autocast")
    report.add_out(parser, "memory")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not timm.is_model(model):
            parser.error(f"{model} is no timm model")
    return arguments


def _size(text: str) -> Extent:
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 800x1333")
    return int(sides[1]), int(sides[2])


def measure(model: str, task: str, size: Extent, precision: str, recompute: bool) -> dict[str, float]:
    """Train on one image; for a process that does nothing else."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = TASKS[task](backbone(model, -(-min(size) // 32) * 32), NUM_CLASSES).to(device).train()
    detector.set_grad_checkpointing(recompute)
    images, objects = torch.randn(1, 3, *size, device=device), _objects(size, device)
    before_bytes, start = _taken_bytes(device)[0], time.perf_counter()
    with torch.autocast(device.type, PRECISIONS[precision], enabled=PRECISIONS[precision] is not None):
        losses = detector(images, [size], [objects])
    assert isinstance(losses, dict)
    torch.stack(list(losses.values())).sum().backward()
    peak_bytes = _taken_bytes(device)[1]  # which waits for the device
    return {
        "before_mib": round(before_bytes / MIB),
        "peak_mib": round(peak_bytes / MIB),
        "step_s": round(time.perf_counter() - start, 1),
    }


def _taken_bytes(device: torch.device) -> tuple[int, int]:
    """Returns the bytes taken now, and the most so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def _objects(size: Extent, device: torch.device) -> Objects:
    """A quarter of the image's height and width each, at random places, with a mask that fills the box."""
    height, width = size
    corners = torch.rand(NUM_OBJECTS, 2) * torch.tensor([width, height]) * 0.75
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], dim=1)
    masks = torch.zeros(NUM_OBJECTS, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(NUM_CLASSES, (NUM_OBJECTS,))
    return Objects(boxes.to(device), labels.to(device), masks.to(device))


if __name__ == "__main__":
    cli.run(main)
