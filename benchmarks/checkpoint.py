"""How long saving keeps training waiting, and how long it takes: ours and others, the same state in the same run.

    full state ─▶ rounds: every contender in rotated order, a plain copy, a plain write, training steps ─▶ medians

python -m benchmarks.checkpoint [--model pvt_large] [--image-size 224] [--folder DIR] [--saves 5] [--ranks 1]

The state is full: weights, Adam's two moments and an average of the weights, fp32. Stall: until the call returns and
training may go on. Total: until the checkpoint is whole. Beside them stands what hardware allows, measured in every
round just before ours: `bound`, one contiguous copy of the same bytes from the device to host memory that is there
already; `disk`, writing the same bytes to one file with fsync; `hash`, SHA-256 of them on one core, which ours takes
and others do not.

Then, in every round again, steps of training go on through a save of the contenders that write behind training:
`slowdown` is the median step while a save is under way over the median step without; `cost_s` is what the save takes
from training in all, its stall and the slower steps. Figures of several ranks are the slowest rank's.

The first save is reported apart: memory is found then. It is read back and compared with the engine, bit for bit.
"""

import argparse
import dataclasses
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tqdm import tqdm

from benchmarks import report, synthetic
from benchmarks.savers import Contender, Distributed, Ours, contenders, share_of
from pipeline import cli, world
from pipeline.config import Config
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.classify import ClassificationTask, build_model
from pipeline.train.checkpoint_files import EMA, MODEL, damage
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.world import World

IMAGES = {"cpu": 2, "cuda": 64}  # a rank's part of a training step
NUM_CLASSES = 1000
BEHIND = ("ours", "dcp_async_cached")  # trained through
UNHINDERED_STEPS = 4  # in a round

Readings = dict[str, list[float]]


def main() -> dict[str, Any] | None:
    arguments = _arguments()
    if arguments.ranks > 1 and "RANK" not in os.environ:
        return _start_ranks(arguments.ranks)
    load = os.getloadavg()[0]
    here = world.start()
    # DCP says that it is experimental and DeepSpeed's dependencies that they are outdated: no news to this command.
    warnings.simplefilter("ignore")
    scratch = here.from_first(tempfile.mkdtemp(prefix="saves-", dir=arguments.folder) if here.is_first else "")
    try:
        bench = Bench.of(arguments, here, Path(scratch))
        rounds = bench.run(arguments.saves)
    finally:
        if here.is_first:
            shutil.rmtree(scratch)
    world.stop()
    if not here.is_first:
        return None
    result = summary(rounds)
    print(table(rounds, result), file=sys.stderr)
    about = {"model": arguments.model, "bytes": bench.num_bytes, "ranks": here.size, "saves": arguments.saves}
    bars = {
        f"{what} of {arguments.model}": {
            name: of[f"{what}_s"][1:] for name, of in rounds.items() if f"{what}_s" in of and "stall_s" in of
        }
        for what in ("stall", "total")
    }
    return report.finish(
        "checkpoint",
        {**about, **result, "threads": torch.get_num_threads(), "load_before": load},
        arguments.out,
        device=here.device.type,
        details={"rounds": rounds},
        draw=report.bars(bars, "s", f"saving: {report.device_name(here.device.type)}"),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="Compare ways of saving.")
    parser.add_argument("--model", default="pvt_large")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; what is written there is removed")
    parser.add_argument("--saves", type=int, default=5, help="of each contender, after a first one")
    parser.add_argument("--ranks", type=int, default=1, help="processes to start here")
    report.add_out(parser, "checkpoint")
    arguments = parser.parse_args()
    if arguments.saves < 1 or arguments.ranks < 1:
        parser.error("--saves and --ranks are at least 1")
    if arguments.folder and not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder}: no such folder")
    return arguments


def _start_ranks(ranks: int) -> None:
    """This command again on every rank. The first prints the result."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.checkpoint", *sys.argv[1:]], env={"OMP_NUM_THREADS": threads, **os.environ}
    )
    if done.returncode:
        raise RuntimeError(f"a rank ended with {done.returncode}: it says more above")


@dataclasses.dataclass
class Bench:
    world: World
    scratch: Path
    engine: Engine
    ema: Ema
    batch: MicroBatch
    contenders: dict[str, Contender]
    num_bytes: int  # of all ranks
    source: torch.Tensor  # as many bytes as this rank's share, on the device
    host: torch.Tensor  # room for them, pinned if the device is a GPU
    step: int = 0

    @classmethod
    def of(cls, arguments: argparse.Namespace, here: World, scratch: Path) -> "Bench":
        config = _config(arguments, here)
        batch = synthetic.batch(IMAGES[here.device.type], arguments.image_size, NUM_CLASSES, here.device)
        task = ClassificationTask(build_model(config.model, config.image.size, NUM_CLASSES))
        engine = Engine(config, task, here, lambda step: [batch])
        ema = Ema(engine, 0.9999)
        own_bytes = sum(tensor.numel() * tensor.element_size() for tensor in share_of(engine, ema, here).values())
        source = torch.ones(own_bytes, dtype=torch.uint8, device=here.device)
        host = torch.empty(own_bytes, dtype=torch.uint8, pin_memory=here.device.type == "cuda").fill_(0)
        bench = cls(
            world=here,
            scratch=scratch,
            engine=engine,
            ema=ema,
            batch=batch,
            contenders=contenders(scratch, engine, ema, here),
            num_bytes=round(here.sum(torch.tensor(own_bytes, dtype=torch.float64, device=here.device)).item()),
            source=source,
            host=host,
        )
        for _ in range(2):  # weights, average and moments that all differ
            bench.train()
        return bench

    def run(self, saves: int) -> dict[str, Readings]:
        """Readings of every round, the first one's first; of steps, all that were taken after the first round."""
        found: dict[str, Readings] = {name: {"stall_s": [], "total_s": [], "bytes": []} for name in self.contenders}
        found["hardware"] = {"bound_s": [], "disk_s": [], "hash_s": []}
        found["training"] = {"step_s": []}
        for name in BEHIND:
            found[name] |= {"steps_s": [], "cost_s": [], "total_training_s": []}
        names = list(self.contenders)
        with tqdm(range(saves + 1), "measuring", unit="round", disable=not self.world.is_first or None) as rounds:
            for number in rounds:
                for place in range(len(names)):
                    name = names[(place + number) % len(names)]
                    if name == "ours":
                        _append(found["hardware"], self.hardware())
                    _append(found[name], self.measure(name))
                    if name == "ours" and number == 0:
                        self.check_first()
                    self.clean(name)
                if number > 0:
                    self.measure_training(found)
        for contender in self.contenders.values():
            if isinstance(contender, Ours | Distributed):
                contender.close()
        return found

    def measure(self, name: str) -> dict[str, float]:
        """One save, with nothing beside it."""
        contender = self.contenders[name]
        began = self.now()
        contender.begin()
        stall_s = time.perf_counter() - began
        staged_s = {}
        if isinstance(contender, Distributed) and contender.staged:
            contender.staged.result()
            staged_s = {"staged_s": time.perf_counter() - began}
        contender.wait()
        total_s = time.perf_counter() - began
        own = self.slowest({"stall_s": stall_s, "total_s": total_s, **staged_s})
        return {**own, "bytes": float(_bytes_below(self.scratch / name))}

    def clean(self, name: str) -> None:
        self.world.barrier()
        if self.world.is_first:
            shutil.rmtree(self.scratch / name)
            os.sync()  # or what one contender leaves to the system to write would slow the next one's copy
        self.world.barrier()

    def hardware(self) -> dict[str, float]:
        path = self.scratch / f"plain-{self.world.rank}"
        disk_s = self.timed(lambda: _write_and_sync(path, self.host.numpy().data))
        path.unlink()
        hash_s = self.timed(lambda: hashlib.sha256(self.host.numpy().data))
        os.sync()
        self.source.fill_(self.step % 256)
        bound_s = self.timed(lambda: self.host.copy_(self.source, non_blocking=True))
        return self.slowest({"bound_s": bound_s, "disk_s": disk_s, "hash_s": hash_s})

    def measure_training(self, found: dict[str, Readings]) -> None:
        """Steps without a save, and with one of each contender behind them."""
        usual = [self.timed(self.train) for _ in range(UNHINDERED_STEPS)]
        found["training"]["step_s"] += usual
        for name in BEHIND:
            contender, steps = self.contenders[name], []
            began = self.now()
            contender.begin()
            stall_s = time.perf_counter() - began
            while not contender.done():
                steps.append(self.timed(self.train))
            total_s = time.perf_counter() - began
            extra_s = sum(steps) - len(steps) * statistics.median(usual)
            found[name]["steps_s"] += steps
            _append(found[name], self.slowest({"cost_s": stall_s + extra_s, "total_training_s": total_s}))
            self.clean(name)

    def train(self) -> None:
        self.engine.step([self.batch], step=self.step, lr=1e-6)
        self.ema.update()
        self.step += 1

    def check_first(self) -> None:
        """Raise RuntimeError unless the checkpoint on disk is the engine's state, bit for bit."""
        ours = self.contenders["ours"]
        assert isinstance(ours, Ours)
        saved: dict[str, torch.Tensor] = {}
        for path in ours.newest.glob("*.safetensors"):
            prefix = {MODEL: "model.", EMA: "ema."}.get(path.name, "")
            saved.update((prefix + name, tensor) for name, tensor in safetensors.torch.load_file(path).items())
        state = share_of(self.engine, self.ema, self.world)
        wrong = [name for name, tensor in state.items() if not _same_bits(saved.get(name), tensor)]
        if fault := damage(ours.newest) or (wrong and f"{wrong[0]} is not what the engine holds"):
            raise RuntimeError(f"{ours.newest}: {fault}")

    def timed(self, act: Callable[[], object]) -> float:
        began = self.now()
        act()
        self.synchronize()
        return time.perf_counter() - began

    def now(self) -> float:
        """When all ranks and the device are through with what came before."""
        self.synchronize()
        self.world.barrier()
        self.synchronize()  # on a GPU the barrier itself is work of the device
        return time.perf_counter()

    def synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def slowest(self, reading: dict[str, float]) -> dict[str, float]:
        own = torch.tensor(list(reading.values()), dtype=torch.float64, device=self.world.device)
        return dict(zip(reading, self.world.gather(own).amax(dim=0).tolist(), strict=True))


def _config(arguments: argparse.Namespace, here: World) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "checkpoint"},
            "model": {"name": arguments.model},
            "image": {"size": arguments.image_size},
            "data": {"train": "unused", "lanes": here.size},
            "optim": {"lr": 1e-3},
            "train": {"length": "1 step", "global_batch_size": here.size * IMAGES[here.device.type]},
            "engine": {"precision": "bf16" if here.device.type == "cuda" else "fp32"},
        }
    )


def _append(readings: Readings, reading: dict[str, float]) -> None:
    for name, value in reading.items():
        readings.setdefault(name, []).append(value)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _same_bits(saved: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    if saved is None or saved.dtype != tensor.dtype or saved.shape != tensor.shape:
        return False
    return saved.numpy().tobytes() == tensor.detach().cpu().contiguous().numpy().tobytes()


def _write_and_sync(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def summary(found: dict[str, Readings]) -> dict[str, Any]:
    """Medians after the first round."""
    hardware, step_s = found["hardware"], statistics.median(found["training"]["step_s"])
    contenders = {name: _figures(readings, step_s) for name, readings in found.items() if "stall_s" in readings}
    ours, bounds = contenders.pop("ours"), hardware["bound_s"][1:]
    ratios = [stall_s / bound_s for stall_s, bound_s in zip(found["ours"]["stall_s"][1:], bounds, strict=True)]
    rounded = {
        **ours,
        "bound_s": statistics.median(bounds),
        "stall_over_bound": statistics.median(ratios),
        "disk_s": statistics.median(hardware["disk_s"]),
        "hash_s": statistics.median(hardware["hash_s"]),
        "step_s": step_s,
    }
    return {**_rounded(rounded), "peers": {name: _rounded(figures) for name, figures in contenders.items()}}


def _figures(readings: Readings, step_s: float) -> dict[str, float]:
    figures = {
        name: statistics.median(readings[name][1:]) for name in ("stall_s", "staged_s", "total_s") if name in readings
    }
    figures |= {
        "least_stall_s": min(readings["stall_s"][1:]),
        "first_stall_s": readings["stall_s"][0],
        "written_bytes": readings["bytes"][-1],
    }
    if "cost_s" in readings:
        figures |= {name: statistics.median(readings[name]) for name in ("cost_s", "total_training_s")}
        if readings["steps_s"]:
            figures["slowdown"] = statistics.median(readings["steps_s"]) / step_s
    return figures


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: int(value) if name.endswith("bytes") else round(value, 4) for name, value in figures.items()}


def table(found: dict[str, Readings], result: dict[str, Any]) -> str:
    """Markdown."""
    bound_s, peers = result["bound_s"], result["peers"]
    lines = [
        "| | stall, s | least – most | over bound | first stall, s | total, s | GB | training costs, s | its steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in (("ours", result), *peers.items()):
        stalls = found[name]["stall_s"][1:]
        lines.append(
            f"| {name} | {figures['stall_s']:.3f} | {min(stalls):.3f} – {max(stalls):.3f} "
            f"| {figures['stall_s'] / bound_s:.2f} | {figures['first_stall_s']:.3f} | {figures['total_s']:.2f} "
            f"| {figures['written_bytes'] / 1e9:.3f} "
            f"| {_cell(figures, 'cost_s')} | {_cell(figures, 'slowdown')} |"
        )
    lines += [
        "",
        f"one copy of these bytes to host memory: {bound_s:.3f} s ({result['stall_over_bound']:.2f} of it in the same "
        f"round is ours); to the disk with fsync: {result['disk_s']:.2f} s; SHA-256: {result['hash_s']:.2f} s",
        f"a training step: {result['step_s']:.2f} s; its steps: how much longer while a save is being written",
        "dcp_async_staged copies behind training as well: weights may change after "
        f"{peers['dcp_async_staged']['staged_s']:.3f} s",
        "deepspeed: without the average; deepspeed and torch_save are not synced to the disk",
    ]
    return "\n".join(lines)


def _cell(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else ""


if __name__ == "__main__":
    cli.run(main)
