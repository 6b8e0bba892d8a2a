"""What limits each stage of a PVT's training step: the device's matrix rate, its memory, or neither.

python -m benchmarks.roofline [MODEL] [--batch N] [--precision bf16] [--compile] [--rounds 5] [--out DIR]

    each stage on a random map ──▶ rounds: forward and backward, in turns ──▶ ms beside two floors ──▶ table, plot

Of each stage: the FLOPs of forward and backward pass, counted; `moved`, the bytes that PyTorch's operators read and
write when each does so by itself, counted too; and two floors, FLOPs over the rate of large matrix products and bytes
over the rate of large copies, both measured in this run. The higher floor is what eager execution cannot go below: what
takes longer has small operators or poor kernels, and what lies on its memory floor gets faster by fusing operators
alone. Caches can undercut the memory floor.
"""

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pvt  # noqa: F401  registers the models
from benchmarks import report
from benchmarks.step import DEPTHS, SIZE_PX, Contender, take_turns, timed
from pipeline import cli
from pipeline.flops import DTYPES, matrix_flop_s
from pipeline.train.compile import compile_blocks
from pipeline.world import keep_freed_memory
from pvt.model import STRIDES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COPIED_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}


class Cost(NamedTuple):
    flop: float
    moved_bytes: float


class Moved(TorchDispatchMode):
    """Sums up the bytes that operators read and write. Views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(result)
        if not _is_view(func, read, written) and "empty" not in str(func):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Returns whether an operator only renames memory that it was given.

    The memory decides, not the schema: `_unsafe_view`, behind each linear layer, is not declared as a view.
    """
    memory = {tensor.untyped_storage().data_ptr() for tensor in read}
    return not func._schema.is_mutable and all(tensor.untyped_storage().data_ptr() in memory for tensor in written)


def main() -> dict[str, Any]:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    dtype, batch = DTYPES[arguments.precision], arguments.batch or (128 if device.type == "cuda" else 8)
    flop_s, bytes_s = matrix_flop_s(device, dtype), copied_bytes_s(device)
    network = timm.create_model(arguments.model, num_classes=0).to(device).train()
    steps = {}
    for number, stage in enumerate(network.stages):  # pyright: ignore[reportArgumentType, reportCallIssue]
        steps[f"stage {number + 1}"] = functools.partial(_step, stage, _input(network, number, batch, device), dtype)
    costs = {name: cost(step) for name, step in steps.items()}  # of plain operators
    if arguments.compile:
        compile_blocks(network)
    contending = [Contender(name, step) for name, step in steps.items()]
    seconds = take_turns(contending, arguments.rounds, device, arguments.turn)
    rows = [
        {
            "stage": name,
            "ms": 1e3 * took,
            "matrix_floor_ms": 1e3 * costs[name].flop / flop_s,
            "memory_floor_ms": 1e3 * costs[name].moved_bytes / bytes_s,
            "gflop": costs[name].flop / 1e9,
            "moved_gb": costs[name].moved_bytes / 1e9,
            "mfu": costs[name].flop / took / flop_s,
        }
        for name, took in seconds.items()
    ]
    print(table(rows), file=sys.stderr)
    about = {
        **{"model": arguments.model, "batch": batch, "precision": arguments.precision, "compile": arguments.compile},
        **{"matrix_tflop_s": flop_s / 1e12, "memory_gb_s": bytes_s / 1e9, "threads": torch.get_num_threads()},
    }
    return report.finish(
        "roofline",
        {**about, "stages": rows},
        arguments.out,
        device=device.type,
        draw=functools.partial(plot, rows, about, report.device_name(device.type)),
    )


def _input(network: Any, stage: int, batch: int, device: torch.device) -> Tensor:
    channels, stride = network.in_chans, 1
    if stage:
        channels, stride = network.feature_info[stage - 1]["num_chs"], STRIDES[stage - 1]
    return torch.randn(batch, channels, SIZE_PX // stride, SIZE_PX // stride, device=device).requires_grad_(stage > 0)


def _step(stage: nn.Module, image: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        tokens, _ = stage(image)
    tokens.backward(torch.ones_like(tokens))
    for tensor in (image, *stage.parameters()):
        tensor.grad = None


def cost(step: Any) -> Cost:
    with FlopCounterMode(display=False) as flop, Moved() as moved:
        step()
    return Cost(flop.get_total_flops(), moved.bytes)


def copied_bytes_s(device: torch.device) -> float:
    """Bytes a second that are read and written when a large tensor is copied: the quickest of a few."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copy = functools.partial(target.copy_, source)
    timed(copy, 1, device)
    return 2 * source.numel() / min(timed(copy, 1, device) for _ in range(7))


def table(rows: list[dict[str, Any]]) -> str:
    total = sum(row["ms"] for row in rows)
    lines = [
        "| | ms | of all | MFU | matrix floor, ms | memory floor, ms | FLOP a byte | time over the higher floor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        floor = max(row["matrix_floor_ms"], row["memory_floor_ms"])
        lines.append(
            f"| {row['stage']} | {row['ms']:.1f} | {row['ms'] / total:.0%} | {row['mfu']:.0%} "
            f"| {row['matrix_floor_ms']:.1f} | {row['memory_floor_ms']:.1f} | {row['gflop'] / row['moved_gb']:.0f} "
            f"| {row['ms'] / floor:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], about: dict[str, Any], device: str, figure: "Figure") -> None:
    peak, bandwidth = about["matrix_tflop_s"], about["memory_gb_s"] / 1e3
    figure.set_size_inches(6.5, 4)
    axes = figure.subplots()
    intensities = [row["gflop"] / row["moved_gb"] for row in rows]
    ends = min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
    corner = [ends[0], peak / bandwidth, ends[1]]
    axes.plot(corner, [min(peak, bandwidth * at) for at in corner], color="black", label="roof: copies, then products")
    for number, (row, at) in enumerate(zip(rows, intensities, strict=True)):
        rate = row["gflop"] / row["ms"]  # GFLOP / ms is TFLOP/s
        axes.plot(at, rate, "o", color="tab:orange")
        aside = (7, -12) if number % 2 else (-42, 6)  # neighbours can be close to each other
        axes.annotate(row["stage"], (at, rate), xytext=aside, textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that eager operators move", ylabel="TFLOP/s")
    axes.set_ylim(top=peak * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:.2g}")
    axes.legend(loc="lower right")
    compiled = ", compiled" if about["compile"] else ""
    figure.suptitle(f"{about['model']}, batch {about['batch']}, {about['precision']}{compiled}: {device}", fontsize=9)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="pvt_large", choices=DEPTHS, metavar="MODEL")
    parser.add_argument("--batch", type=report.count, help="images (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="the blocks; takes minutes on a CPU")
    report.add_rounds(parser, 5)
    report.add_out(parser, "roofline")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
