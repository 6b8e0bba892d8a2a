"""A training step of each PVT: ours, Transformers' and a plain one, as they are and compiled.

python -m benchmarks.step [MODEL …] [--batch N] [--precision bf16] [--compile] [--rounds 7] [--out DIR]

    contenders, all of one size in memory ──▶ rounds: each takes its turn ──▶ medians ──▶ table, JSON lines, plot

A step is forward, loss, backward and AdamW (fused) at the same precision and batch, on the GPU if there is one. Drop
path is on. Needs torch, timm and transformers alone, so that it can be carried to any machine, and for the picture
matplotlib; twins_pcpvt_large of timm, PVT-Large's nearest relative, is there for scale. MFU (pipeline/flops.py) is over
what this device reaches in products of large matrices at the same precision, measured in the same run.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import pvt  # noqa: F401  registers the models
from benchmarks import report
from benchmarks.plain_pvt import PlainPvt
from pipeline.flops import DTYPES, matrix_flop_s, training_flops
from pipeline.train.compile import compile_blocks
from pipeline.world import keep_freed_memory

DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
NUM_CLASSES, SIZE_PX, DROP_PATH = 1000, 224, 0.3
PEERS = ("Transformers", "plain")


class Contender(NamedTuple):
    name: str
    step: Callable[[], object]


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (128 if device.type == "cuda" else 8)
    dtype = DTYPES[arguments.precision]
    if device.type == "cpu":
        keep_freed_memory()  # for all of them; it is our training that does so
    about = {
        **{"batch": batch, "precision": arguments.precision, "rounds": arguments.rounds},
        **{"threads": torch.get_num_threads(), **report.measured_on(device.type)},
        "matrix_tflop_s": round(matrix_flop_s(device, dtype) / 1e12, 3),
    }
    print(json.dumps(about), "| model | contender | images/s | over the best peer | MFU |", sep="\n", file=sys.stderr)
    print("|---|---|---:|---:|---:|", file=sys.stderr)
    results = []
    for model in arguments.models:
        # Again, because others on the machine can slow down the first.
        about["matrix_tflop_s"] = max(about["matrix_tflop_s"], round(matrix_flop_s(device, dtype) / 1e12, 3))
        contending = list(contenders(model, device, dtype, batch, arguments.compile))
        seconds = take_turns(contending, arguments.rounds, device, arguments.turn)
        del contending
        results.append(result := summary(model, seconds, batch, about["matrix_tflop_s"] * 1e12))
        for name, each in result["contenders"].items():
            cells = f"{each['images_per_second']:.2f} | {each['over_best_peer']:.2f} | {each['mfu']:.1%}"
            print(f"| {model} | {name} | {cells} |", file=sys.stderr, flush=True)
        print(json.dumps({**result, **about}), flush=True)
    bars = {
        result["model"]: {name: [each["images_per_second"]] for name, each in result["contenders"].items()}
        for result in results
    }
    title = f"a training step, batch {batch}, {arguments.precision}: {about['device']}"
    report.finish(
        "step",
        {**about, "models": results},
        arguments.out,
        device=device.type,
        draw=report.bars(bars, "images/s", title),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(DEPTHS), metavar="MODEL", help=f"of {', '.join(DEPTHS)}")
    parser.add_argument("--batch", type=report.count, help="images (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="all of them compiled, too; takes minutes on a CPU")
    report.add_rounds(parser, 7)
    report.add_out(parser, "step")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(DEPTHS):
        parser.error(f"{', '.join(sorted(unknown))}: no such model; there are {', '.join(DEPTHS)}")
    return arguments


def contenders(
    model: str, device: torch.device, dtype: torch.dtype, batch: int, with_compiled: bool
) -> Iterator[Contender]:
    config = {"num_classes": NUM_CLASSES, "drop_path_rate": DROP_PATH}
    networks: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: timm.create_model(model, **config),
        "Transformers": lambda: transformers.PvtForImageClassification(
            transformers.PvtConfig(depths=list(DEPTHS[model]), num_labels=NUM_CLASSES, drop_path_rate=DROP_PATH)
        ),
        "plain": lambda: PlainPvt(DEPTHS[model], **config),
    }
    if model == "pvt_large":
        networks["twins_pcpvt_large"] = lambda: timm.create_model("twins_pcpvt_large", **config)
    for is_compiled in (False, True) if with_compiled else (False,):
        for name, make in networks.items():
            torch.manual_seed(0)
            network = make().to(device).train()
            # Drawn outside of the network, as our training does.
            rates = torch.tensor(network.drop_path_rates, device=device) if name == "ours" else None
            if is_compiled and name == "ours":
                compile_blocks(network)
            elif is_compiled:
                network.compile()
            yield Contender(
                f"{name}, compiled" if is_compiled else name, training_step(network, device, dtype, batch, rates)
            )


def training_step(
    network: nn.Module, device: torch.device, dtype: torch.dtype, batch: int, drop_path_rates: Tensor | None
) -> Callable[[], None]:
    images = torch.randn(batch, 3, SIZE_PX, SIZE_PX, device=device)
    labels = torch.randint(NUM_CLASSES, (batch,), device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> None:
        more = {}
        if drop_path_rates is not None:
            kept = torch.rand(len(drop_path_rates), batch, device=device) >= drop_path_rates[:, None]
            more["drop_path"] = kept / (1 - drop_path_rates[:, None])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = network(images, **more)
            loss = F.cross_entropy(getattr(outputs, "logits", outputs).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(contending: list[Contender], rounds: int, device: torch.device, turn_s: float) -> dict[str, float]:
    """Returns the seconds a step of each takes, the median of the rounds. A turn takes about `turn_s`."""
    num_steps = {}
    for each in contending:
        timed(each.step, 2, device)  # compiles, and asks for memory
        num_steps[each.name] = max(1, math.ceil(turn_s / timed(each.step, 1, device)))
    seconds: dict[str, list[float]] = {each.name: [] for each in contending}
    for number in range(rounds):
        first = number % len(contending)
        for each in contending[first:] + contending[:first]:
            seconds[each.name].append(timed(each.step, num_steps[each.name], device))
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def timed(step: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds a time."""
    begin = _now(device)
    for _ in range(times):
        step()
    return (_now(device) - begin) / times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(model: str, seconds: dict[str, float], batch: int, matrix_flop_s: float) -> dict[str, Any]:
    flop = training_flops(lambda: PlainPvt(DEPTHS[model], NUM_CLASSES), SIZE_PX)
    peer = min(took for name, took in seconds.items() if name.startswith(PEERS))
    ours = min(took for name, took in seconds.items() if name.startswith("ours"))
    return {
        "model": model,
        "images_per_second": round(batch / ours, 3),
        "ratio_best_peer": round(peer / ours, 3),
        "contenders": {
            name: {
                "images_per_second": round(batch / took, 3),
                "over_best_peer": round(peer / took, 3),
                "mfu": round(flop * batch / took / matrix_flop_s, 4),
            }
            for name, took in seconds.items()
        },
    }


if __name__ == "__main__":
    main()
