"""PVT's attention, forward and backward, by each way to compute it: which is quickest for which shape, on this device.

python -m benchmarks.attention [--size 224] [--batch N] [--precision bf16] [--rounds 7] [--out DIR]

    each stage's q, k, v ──▶ rounds: products, PyTorch's backends, pvt.model.attend, in turns ──▶ medians ──▶ table

Spatial reduction leaves few keys, 49 at 224 px, so what wins elsewhere need not win here. `ours` is what the model
takes; its ratio to the quickest is what a better rule could gain. A backend that does not take a shape has no figure.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import report
from benchmarks.step import Contender, take_turns, timed
from pipeline import cli
from pipeline.flops import DTYPES
from pipeline.world import keep_freed_memory
from pvt.model import STRIDES, attend, by_products

HEADS, REDUCTIONS, HEAD_DIM = (1, 2, 5, 8), (8, 4, 2, 1), 64
"""Of each stage of all PVTs of the paper."""
BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
OURS = "ours"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> dict[str, Any]:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    batch = arguments.batch or (128 if device.type == "cuda" else 8)
    ways: dict[str, Attend] = {"products": by_products, **{name: _by(backend) for name, backend in BACKENDS.items()}}
    print(f"| stage | queries | keys | heads | {' | '.join([*ways, OURS])} | ours over the quickest |", file=sys.stderr)
    print("|---" * (6 + len(ways)) + "|", file=sys.stderr)
    stages = []
    for stage, (stride, heads, reduction) in enumerate(zip(STRIDES, HEADS, REDUCTIONS, strict=True)):
        is_last = reduction == 1  # with the class token
        side = arguments.size // stride
        queries, keys = side**2 + is_last, (side // reduction) ** 2 + is_last
        tensors = [
            torch.randn(batch, heads, tokens, HEAD_DIM, device=device, dtype=DTYPES[arguments.precision])
            for tokens in (queries, keys, keys)
        ]
        contending = [Contender(name, functools.partial(_step, way, tensors)) for name, way in ways.items()]
        contending = [each for each in contending if _works(each, device)] + [
            Contender(OURS, functools.partial(_step, attend, tensors))
        ]
        ms = {
            name: 1e3 * took for name, took in take_turns(contending, arguments.rounds, device, arguments.turn).items()
        }
        quickest = min(took for name, took in ms.items() if name != OURS)
        cells = [f"{ms[name]:.2f}" if name in ms else "" for name in (*ways, OURS)]
        print(
            f"| {stage + 1} | {queries} | {keys} | {heads} | {' | '.join(cells)} | {ms[OURS] / quickest:.2f} |",
            file=sys.stderr,
            flush=True,
        )
        stages.append({"queries": queries, "keys": keys, "heads": heads, "ms": ms, "ratio": ms[OURS] / quickest})
    about = {"batch": batch, "size": arguments.size, "precision": arguments.precision}
    bars = {
        f"stage {number}, {stage['keys']} keys": {name: [ms] for name, ms in stage["ms"].items()}
        for number, stage in enumerate(stages, 1)
    }
    title = f"attention, {arguments.size} px, batch {batch}, {arguments.precision}: {report.device_name(device.type)}"
    return report.finish(
        "attention",
        {**about, "threads": torch.get_num_threads(), "stages": stages},
        arguments.out,
        device=device.type,
        draw=report.bars(bars, "ms", title),
    )


def _by(backend: SDPBackend) -> Attend:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return way


def _step(way: Attend, tensors: list[Tensor]) -> None:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = way(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def _works(contender: Contender, device: torch.device) -> bool:
    with contextlib.suppress(RuntimeError):  # no kernel of that backend
        timed(contender.step, 1, device)
        return True
    return False


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="of the image in pixels, a multiple of 32 (default: 224)")
    parser.add_argument("--batch", type=report.count, help="images (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    report.add_rounds(parser, 7)
    report.add_out(parser, "attention")
    arguments = parser.parse_args()
    if arguments.size % STRIDES[-1] or arguments.size < STRIDES[-1]:
        parser.error(f"--size {arguments.size} is not a multiple of {STRIDES[-1]}")
    return arguments


if __name__ == "__main__":
    cli.run(main)
