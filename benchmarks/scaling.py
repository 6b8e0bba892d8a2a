"""How a training step scales to 8 … 4,096 GPUs at ZeRO 0 to 3: a model, checked in the same run against real steps.

python -m benchmarks.scaling [--config FILE] [--mfu 0.3] [--feed 5000] [--jitter 0.01] [--no-check] [--out DIR]

    one and two ranks here, CPU and gloo ─▶ pieces ─▶ model ─▶ predicted beside real steps, and their errors
    nodes of 8 H200, assumed             ─▶ pieces ─▶ model ─▶ step, images/s, efficiency, shares ─▶ tables, plot

The model and its sources are in scaling_model.py; what is measured, in scaling_ranks.py. The check takes two minutes.

Measured are the network's forward and backward pass and AdamW with nothing around them, of one rank alone and of one
with another beside it that it does not talk to: two ranks share memory and caches, so two are predicted from the
second figure. Further, how much such ranks differ from step to step; a copy of the gradients; what DeepSpeed's hooks
take, from steps of a network that is too small for anything else to take time; and collectives of a few sizes. No step
of the engine with the network that is checked goes into its prediction.

Assumed of the H200, by NVIDIA's data sheets: 989 TFLOP/s of bf16, of which `--mfu` is used; memory of 4.8 TB/s; NVLink
of 450 GB/s and an adapter of 50 GB/s (400 Gb/s) a GPU, each direction, of which 80 % is used. By NCCL's own table
(src/graph/tuning.cc, rings with LL128): 1.9 µs a hop on NVLink, 4 µs on the network, 10 µs a call. Without a source:
`--jitter`. The feed is assumed too; saves are those of RESULTS.md.

The host's time was measured, on two cores of a virtual AMD EPYC with a CUDA runtime that computes nothing: PVT-Large
takes 60 ms of a core for a step at ZeRO-0, whatever the batch. Other networks are taken to need as much a weight. The
stages' own Python comes on top: what the hooks would take if they cost what they cost here is printed.

Efficiency: images a second of a GPU, over those of one GPU alone at ZeRO-0 that waits for nothing.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, report, scaling_model, sizing
from benchmarks.scaling_model import RING_PASSES, Hardware, Link, Network, Pieces, Setting, Step, Weight
from pipeline import cli, network
from pipeline.config import Config, load_config
from pipeline.errors import ExternalError, InputError
from pipeline.train.optim import parameter_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GPUS = (8, 16, 64, 256, 1024, 4096)
SETTINGS = {
    "ZeRO-0": Setting(0),
    "ZeRO-1": Setting(1),
    "ZeRO-2": Setting(2),
    "ZeRO-3": Setting(3, overlap_comm=True),
    # With keys of `engine.deepspeed.zero_optimization`: overlap_comm: true, and DeepSpeed's own default of
    # stage3_param_persistence_threshold: 100000.
    "ZeRO-2, overlap_comm": Setting(2, overlap_comm=True),
    "ZeRO-3, DeepSpeed's threshold": Setting(3, overlap_comm=True, persistent_elements=100_000),
}
CHECKED_SETTINGS = [name for name in SETTINGS if name != "ZeRO-2, overlap_comm"]  # for which gloo has no stream


class Case(NamedTuple):
    """A network on one batch."""

    model: str
    image_size: int
    batch: int  # of a rank

    def config(self, setting: Setting = SETTINGS["ZeRO-0"], ranks: int = 1) -> Config:
        zero = {"stage3_param_persistence_threshold": setting.persistent_elements} if setting.stage == 3 else {}
        engine = {"zero_stage": setting.stage, "precision": "fp32", "deepspeed": {"zero_optimization": zero}}
        return Config.model_validate(
            {
                "run": {"name": "scaling"},
                "model": {"name": self.model},
                "image": {"size": self.image_size},
                "data": {"train": "unused", "lanes": ranks},
                "optim": {"lr": 1e-6, "clip_grad": 1.0},
                "train": {"length": "1 step", "global_batch_size": ranks * self.batch},
                "engine": engine,
            }
        )


CHECKED = Case("pvt_tiny", 64, 8)
"""Of the real steps."""
SMALL = Case("pvt_pico", 32, 2)
"""A step that is nearly all Python, in which the time of DeepSpeed's hooks shows."""
CHECKED_CLASSES = 10
COLLECTIVE_BYTES = (4, 1 << 20, 1 << 24, 3 << 24)
"""Up to about as many as the gradients have."""
BURST = 100
"""Small all-gathers asked for at once."""
ROUNDS = 8
PARTS = ("forward", "backward", "optimizer")
MOST_DISTURBED = 0.05  # of the cores' time, by other processes

CONFIG = Path("configs/pretrain/pvt_large_in1k.yaml")
LINK_EFFICIENCY = 0.8
MEMORY_BYTES_PER_S = 4.8e12
ADAM_BYTES = 28
"""Of memory for an element: AdamW reads weight, gradient and two moments, and writes all but the gradient."""
JITTER = 0.01
HOST_MS, HOST_WEIGHTS = 60.0, 751
"""The host's milliseconds for a step of PVT-Large at ZeRO-0 (see the module), and the number of its weights."""
STALL_S, SAVE_EVERY_S = 0.18, 300.0
"""PVT-Large's state, one thread: RESULTS.md, "Saving"."""

Readings = dict[str, list[float]]  # seconds, by what was measured


def main() -> dict[str, Any]:
    arguments = _arguments()
    config = _read_config(arguments.config)
    checked = {} if arguments.no_check else check()
    model = network_of(config, sizing.NUM_CLASSES)
    pieces = h200(config, model, arguments)
    steps = {
        name: {gpus: scaling_model.step(pieces, model, setting, gpus) for gpus in (1, *GPUS)}
        for name, setting in SETTINGS.items()
    }
    alone_s = steps["ZeRO-0"][1].computing_s
    efficiency = {name: {gpus: alone_s / of[gpus].total_s for gpus in GPUS} for name, of in steps.items()}
    title = f"{config.model.name}, {pieces.batch} images a GPU, nodes of 8 H200"
    print(f"\n{title}, all assumed\n\n{table(steps, efficiency, pieces.batch)}", file=sys.stderr)
    if checked:
        hooks = (f"{1e-3 * us * len(model.weights):.0f} ms at {name}" for name, us in checked["hook_us"].items())
        print(f"\nNot counted: hooks, if GPUs' hosts are like this one: {'; '.join(hooks)}", file=sys.stderr)
    step_ms = {name: {gpus: 1e3 * step.total_s for gpus, step in of.items()} for name, of in steps.items()}
    result = {
        "worst_error": checked.get("worst_error"),
        "efficiency": _rounded(efficiency),
        "step_ms": _rounded(step_ms),
        "check": checked,
        "model": config.model.name,
        "assumed": {**dataclasses.asdict(pieces), "mfu": arguments.mfu, "link_efficiency": LINK_EFFICIENCY},
    }
    # Nothing but the check is measured, and that on a CPU.
    draw = functools.partial(plot, efficiency, f"{title}: computed, not measured")
    return report.finish("scaling", result, arguments.out, device="cpu", draw=draw)


def _read_config(path: Path) -> Config:
    config, gpus = load_config(path), sizing.GPUS_PER_NODE
    if config.task.name != "classification":
        raise InputError(f"{path}: task: {config.task.name}: only steps of classification are computed")
    if (batch := config.train.global_batch_size) % gpus:
        raise InputError(f"{path}: train.global_batch_size: {batch} is not a multiple of a node's {gpus} GPUs")
    return config


def _rounded(figures: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(gpus): round(figure, 4) for gpus, figure in of.items()} for name, of in figures.items()}


def network_of(config: Config, num_classes: int) -> Network:
    """Its weights, and how much of the forward pass, by FLOPs, is over when each is needed. Made of shapes alone."""
    size = config.image.size
    with torch.device("meta"):
        model = network.build(config.task, config.model, size, num_classes).eval()
        image = torch.empty(1, 3, size, size)
    reached: list[tuple[int, int]] = []  # elements of a weight, FLOPs before its module

    def note(module: nn.Module, _: object) -> None:
        reached.extend((weight.numel(), counter.get_total_flops()) for weight in module.parameters(recurse=False))

    for module in model.modules():
        module.register_forward_pre_hook(note)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    total = counter.get_total_flops()
    groups = parameter_groups(model, config.optim)
    return Network(
        weights=tuple(Weight(num_elements, flops / total) for num_elements, flops in reached),
        groups=tuple(sum(weight.numel() for weight in group["params"]) for group in groups),
    )


def h200(config: Config, model: Network, assumed: argparse.Namespace) -> Pieces:
    """Returns the assumed figures of one GPU (see the module), by default with one node's batch divided by its GPUs."""
    batch = assumed.batch or config.train.global_batch_size // sizing.GPUS_PER_NODE
    flops = network.training_flops(config.task, config.model, config.image.size, sizing.NUM_CLASSES)
    forward_s = batch * flops / 3 / (assumed.mfu * sizing.PEAK_FLOPS["H100, H200"])
    nvlink = Link(latency_s=1.9e-6, bytes_per_s=LINK_EFFICIENCY * 450e9)
    adapter = Link(latency_s=4.0e-6, bytes_per_s=LINK_EFFICIENCY * 50e9)
    return Pieces(
        hardware=Hardware(
            inside=dict.fromkeys(RING_PASSES, nvlink),
            between=dict.fromkeys(RING_PASSES, adapter),
            ranks_per_node=sizing.GPUS_PER_NODE,
            copy_s_per_byte=2 / MEMORY_BYTES_PER_S,
            call_s=10e-6,
        ),
        batch=batch,
        forward_s=forward_s,
        backward_s=2 * forward_s,
        optimizer_s=ADAM_BYTES * sum(model.groups) / MEMORY_BYTES_PER_S,
        jitter=assumed.jitter,
        host_s=1e-3 * assumed.host_ms * len(model.weights) / HOST_WEIGHTS,
        feed=assumed.feed,
        stall_s=assumed.stall_s,
        save_every_s=assumed.save_every_s,
    )


class Checked(NamedTuple):
    setting: str
    ranks: int
    predicted: Step
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted.total_s / self.measured_s - 1

    def rounded(self) -> dict[str, Any]:
        times = {"predicted_ms": self.predicted.total_s, "measured_ms": self.measured_s}
        rounded = {name: round(1e3 * seconds, 2) for name, seconds in times.items()}
        return {"setting": self.setting, "ranks": self.ranks, **rounded, "error": round(self.error, 4)}


def check() -> dict[str, Any]:
    """Real steps of one and two ranks beside those that the model makes of pieces measured without them. Printed."""
    worlds = {ranks: _measured(ranks) for ranks in (1, 2)}
    model, small = (network_of(case.config(), CHECKED_CLASSES) for case in (CHECKED, SMALL))
    links = links_of([rank["torch"] | rank["deepspeed"] for rank in worlds[2]])
    rows, hook_us, traffic = [], {}, {}
    for name in CHECKED_SETTINGS:
        setting = SETTINGS[name]
        linear = "deepspeed" if setting.stage == 3 else "torch"
        one, two = ([rank[linear] for rank in world] for world in worlds.values())
        hook_s = hook_of(name, one, small, copy_of(one, model))
        hook_us[name] = round(1e6 * hook_s, 1)
        # Beside another rank Python is as much slower as the small network is.
        slower = typical(two, "small") / typical(one, "small")
        for ranks, own_hook_s in ((one, hook_s), (two, slower * hook_s)):
            pieces = pieces_of(ranks, links, copy_of(ranks, model), own_hook_s)
            predicted = scaling_model.step(pieces, model, setting, len(ranks))
            rows.append(Checked(name, len(ranks), predicted, slowest(ranks, f"step {name}")))
        sent = {
            "modelled": [call.num_bytes for call in scaling_model.traffic(model, setting, 2).calls],
            "counted": [num_bytes for _, num_bytes in worlds[2][0]["traffic"][name]],
        }
        traffic[name] = {who: {"calls": len(sizes), "bytes": sum(sizes)} for who, sizes in sent.items()}
    print(check_table(rows, traffic), file=sys.stderr)
    return {
        "worst_error": round(max(abs(row.error) for row in rows), 4),
        "steps": [row.rounded() for row in rows],
        "traffic": traffic,
        "hook_us": hook_us,
        "links": {kind: link._asdict() for kind, link in links.items()},
        "jitter": round(jitter_of([rank["torch"] for rank in worlds[2]]), 4),
        "case": CHECKED._asdict(),
    }


def _measured(ranks: int) -> list[dict[str, Any]]:
    """What scaling_ranks says of each rank. On CPUs wherever it is, a thread for each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    began, own, busy = time.monotonic(), _seconds_of_children(), peers.busy_seconds()
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "benchmarks.scaling_ranks"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ExternalError(f"{ranks} ranks could not be measured:\n{done.stderr[-4000:]}")
    others_s = max(0.0, peers.busy_seconds() - busy - _seconds_of_children() + own)
    others = others_s / (time.monotonic() - began) / len(os.sched_getaffinity(0))
    told = " of the cores' time: figures are not to be relied on" if others > MOST_DISTURBED else ""
    print(f"measured {ranks} rank{'s' * (ranks > 1)}, others took {others:.0%}{told}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def _seconds_of_children() -> float:
    """On a core, of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pieces_of(ranks: Sequence[Readings], links: Mapping[str, Link], copy_s_per_byte: float, hook_s: float) -> Pieces:
    forward_s, backward_s, optimizer_s = (typical(ranks, part) for part in PARTS)
    return Pieces(
        hardware=Hardware(links, links, 2, copy_s_per_byte, overlaps=False),
        batch=CHECKED.batch,
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        jitter=jitter_of(ranks),
        hook_s=hook_s,
    )


def typical(ranks: Sequence[Readings], name: str) -> float:
    return statistics.median(seconds for rank in ranks for seconds in rank[name])


def slowest(ranks: Sequence[Readings], name: str) -> float:
    """The median over repetitions, which ranks begin together and which end with the last of them."""
    return statistics.median(map(max, zip(*(rank[name] for rank in ranks), strict=True)))


def copy_of(ranks: Sequence[Readings], model: Network) -> float:
    """Seconds a byte."""
    return typical(ranks, "copy") / model.num_bytes


def hook_of(name: str, ranks: Sequence[Readings], small: Network, copy_s_per_byte: float) -> float:
    """Seconds a weight that the engine's step of the small network takes on one rank more than the network alone."""
    copies_s = scaling_model.passes(small, SETTINGS[name], 1) * small.num_bytes * copy_s_per_byte
    return (typical(ranks, f"small {name}") - typical(ranks, "small") - copies_s) / len(small.weights)


def jitter_of(ranks: Sequence[Readings]) -> float:
    """How much two ranks differ in the same step, as a standard deviation of one over the mean.

    Of a normal distribution, from the median difference: what disturbs both ranks or a single step does not count. Each
    part has its own, as ranks wait for each other after each.
    """
    if len(ranks) == 1:
        return 0.0
    quartile = statistics.NormalDist(sigma=math.sqrt(2)).inv_cdf(0.75)
    pairs = [list(zip(*(rank[part] for rank in ranks), strict=True)) for part in PARTS]
    sigmas = [statistics.median(abs(one - other) for one, other in pair) / quartile for pair in pairs]
    return sum(sigmas) / sum(typical(ranks, part) for part in PARTS)


def links_of(ranks: Sequence[Readings]) -> dict[str, Link]:
    """Latency and bandwidth of each kind of collective between two ranks: least squares of relative errors."""
    links = {}
    for kind, ring_passes in RING_PASSES.items():
        seconds = np.array([slowest(ranks, f"{kind} {num_bytes}") for num_bytes in COLLECTIVE_BYTES])
        if kind == "all_gather":  # stage 3 asks for many small ones at once, which hinder each other
            seconds[0] = slowest(ranks, "burst") / BURST
        terms = ring_passes * np.array([(1.0, num_bytes / 2) for num_bytes in COLLECTIVE_BYTES])
        (latency_s, s_per_byte), _ = nnls(terms / seconds[:, None], np.ones(len(seconds)))
        links[kind] = Link(float(latency_s), float(1 / s_per_byte))
    return links


def check_table(rows: Sequence[Checked], traffic: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Markdown. The model's collectives beside those that were called."""
    parts = ("computing", "bookkeeping", "communication", "stragglers")
    lines = [
        f"| ranks | | {' | '.join(parts)} | predicted, ms | measured, ms | error | calls, MB | called |",
        "|---:|---" + "|---:" * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: row.ranks):
        cells = [f"{1e3 * getattr(row.predicted, f'{part}_s'):.1f}" for part in parts]
        times = [f"{1e3 * row.predicted.total_s:.1f}", f"{1e3 * row.measured_s:.1f}", f"{row.error:+.1%}"]
        sent = [f"{of['calls']}, {of['bytes'] / 1e6:.2f}" for of in traffic[row.setting].values()]
        sent = sent if row.ranks > 1 else [""] * len(sent)
        lines.append(f"| {row.ranks} | {row.setting} | {' | '.join([*cells, *times, *sent])} |")
    return "\n".join(lines)


def table(steps: Mapping[str, Mapping[int, Step]], efficiency: Mapping[str, Mapping[int, float]], batch: int) -> str:
    """Markdown: a row for each setting and number of GPUs, with the parts' shares of the step."""
    parts = [field.name for field in dataclasses.fields(Step)]
    lines = [
        f"| | GPUs | step, ms | images/s | efficiency | {' | '.join(part[:-2] for part in parts)} |",
        "|---" + "|---:" * (4 + len(parts)) + "|",
    ]
    for name, of in efficiency.items():
        for gpus, value in of.items():
            step = steps[name][gpus]
            cells = [f"{getattr(step, part) / step.total_s:.1%}" for part in parts]
            rate = f"{1e3 * step.total_s:.2f} | {batch * gpus / step.total_s:,.0f} | {value:.1%}"
            lines.append(f"| {name} | {gpus:,} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(efficiency: Mapping[str, Mapping[int, float]], title: str, figure: "Figure") -> None:
    from matplotlib.ticker import PercentFormatter

    figure.set_size_inches(7.5, 3.8)
    panel = figure.subplots()
    for name, of in efficiency.items():
        stage = SETTINGS[name].stage
        line = "-" if name == f"ZeRO-{stage}" else "--"
        # ZeRO-1 and -2 send the same: one is seen around the other.
        panel.plot(list(of), list(of.values()), f"C{stage}{'os.^'[stage]}{line}", markersize=7, label=name)
    panel.set_xscale("log", base=2)
    panel.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    panel.set_xlabel("GPUs")
    panel.set_ylim(0, 1.03)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_ylabel("images a second of a GPU,\nover one GPU that waits for nothing")
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, bbox_to_anchor=(1, 0.5), loc="center left")
    figure.suptitle(title, fontsize=9)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])

    def add(name: str, default: float, text: str) -> None:
        parser.add_argument(name, type=float, default=default, metavar="X", help=f"{text} (default: {default:g})")

    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="of the run that is scaled")
    add("--mfu", sizing.MFU, "part of its bf16 peak that a GPU computes with")
    add("--feed", sizing.FEED, "images/s that the feed can give one GPU")
    add("--jitter", JITTER, "standard deviation of a GPU's computing over its mean")
    add("--host-ms", HOST_MS, "what PVT-Large's step takes a GPU's host")
    add("--stall-s", STALL_S, "how long a save keeps training waiting")
    add("--save-every-s", SAVE_EVERY_S, "time between saves")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images of a GPU (default: a node's batch over its GPUs)"
    )
    parser.add_argument("--no-check", action="store_true", help="compute alone, which takes seconds")
    report.add_out(parser, "scaling")
    arguments = parser.parse_args()
    if not 0 < arguments.mfu <= 1:
        parser.error(f"--mfu is a number above 0 and up to 1, found {arguments.mfu:g}")
    if arguments.batch is not None and arguments.batch < 1:
        parser.error(f"--batch is a number of at least 1, found {arguments.batch}")
    zeros = {"feed": False, "jitter": True, "host_ms": True, "stall_s": True, "save_every_s": False}
    for name, may_be_zero in zeros.items():
        value = getattr(arguments, name)
        if not 0 <= value < math.inf or (value == 0 and not may_be_zero):
            least = "of at least 0" if may_be_zero else "above 0"
            parser.error(f"--{name.replace('_', '-')} is a number {least}, found {value:g}")
    return arguments


if __name__ == "__main__":
    cli.run(main)
