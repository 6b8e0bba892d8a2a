"""What `pretrain.py`, `doctor.py --config` and `submit.py --dry-run` answer to the same wrong configurations.

python -m tests.refusals

    case ──digits, tiny.yaml──▶ three commands, two ranks ──▶ exit codes, and whether they give the same message

Exit code 1: an answer differs.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import cli
from pipeline.errors import USAGE
from pipeline.shards.pack import pack
from tests.conftest import write_config
from tests.ranks import ROOT

CASES = {
    "optim.lrr=1": "optim.lrr: no such setting; did you mean optim.lr?",
    "train.ema_decay=false": "train.ema_decay: true and false are not numbers",
    "data.lanes=7": "train.global_batch_size 48 is not a multiple of data.lanes 7",
    "handoff=[{config: nowhere.yaml}]": "nowhere.yaml: cannot read the configuration: No such file",
    "data.val=other": "other and {folder}/train have different classes",
    "data.lanes=1": "2 ranks, but data.lanes is 1",
    "train.length=0 steps": "train.length 0 steps is less than one step",
    "optim.warmup=200 steps": "optim.warmup 200 steps is 200 steps, but the run has 20",
    "train.global_batch_size=9600": "exceeds the 1437 samples of the data set",
    "model.name=pvt_larg": "model.name 'pvt_larg' is no timm model; near: pvt_large",
    "model.name=vgg11": "model.name 'vgg11' cannot be built here",
    "image.size=33": "input of 33x33 px: both sides must be divisible by 32",
    "augment.size_schedule={2 steps: 40}": "augment.size_schedule: pvt_pico does not take 40",
    "engine.deepspeed.bf16.enabled=true": "engine.deepspeed.bf16: the precision is set by engine.precision",
    "engine.deepspeed.zero_optimization.overlap_com=true": "zero_optimization.overlap_com: no such setting",
}
"""Of each wrong override a part of the message."""

COMMANDS = {
    "pretrain": ["launch/pretrain.py"],
    "doctor": ["launch/doctor.py", "--ranks", "2"],
    "dry-run": ["launch/submit.py", "--dry-run"],
}
_TWO_RANKS = ["--set", "cluster.gpus_per_node=2", "--set", "cluster.cpus_per_rank=1"]

Run = Callable[[str, list[str], Path], "subprocess.CompletedProcess[str]"]
"""Runs a command of COMMANDS with further arguments in a folder."""


class Answer(NamedTuple):
    code: int
    error: str
    """From "error: " on."""


def prepare(digits: Path, images: Path, folder: Path) -> None:
    """A configuration in `folder`, and a data set of other classes."""
    write_config(digits, folder)
    few = folder / "few"
    few.mkdir()
    for name in "01":
        (few / name).symlink_to(images / "val" / name)
    pack(few, folder / "other")


def answers(override: str, folder: Path, run: Run) -> dict[str, Answer]:
    """Of the three commands to the configuration with one wrong setting."""
    found = {}
    for name in COMMANDS:
        arguments = ["--config", "tiny.yaml", *_TWO_RANKS, "--set", override]
        done = run(name, arguments, folder)
        found[name] = Answer(done.returncode, done.stderr.rpartition("error: ")[2].strip())
    return found


def agree(found: dict[str, Answer], message: str) -> bool:
    """Whether all refuse with the part of the message that is expected."""
    return all(answer.code == USAGE and message in answer.error for answer in found.values())


def _run(name: str, arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    program, *options = COMMANDS[name]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if name == "pretrain" else []
    words = [sys.executable, *ranks, str(ROOT / program), *options, *arguments]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if ranks:  # torchrun reports the ranks' ends behind what they say, and ends with 1
        ours = re.split(r"\n[EW]\d{4} ", done.stderr)[0]
        code = USAGE if f"exitcode  : {USAGE}" in done.stderr else done.returncode
        return subprocess.CompletedProcess(words, code, done.stdout, ours)
    return done


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        subprocess.run([sys.executable, "launch/digits.py", "--out", folder / "images"], cwd=ROOT, check=True)
        manifest = pack(folder / "images/train", folder / "train")
        pack(folder / "images/val", folder / "val", classes=manifest.classes)
        prepare(folder, folder / "images", folder)
        print(f"| configuration | {' | '.join(COMMANDS)} | message |", file=sys.stderr)
        print("|---" * (2 + len(COMMANDS)) + "|", file=sys.stderr)
        good = 0
        for override, message in CASES.items():
            found = answers(override, folder, _run)
            good += agree(found, message.format(folder=folder))
            codes = " | ".join(str(answer.code) for answer in found.values())
            texts = dict.fromkeys(
                answer.error.removeprefix("tiny.yaml: configuration refused").strip().partition("\n")[0]
                for answer in found.values()
            )
            print(f"| `{override}` | {codes} | {' ≠ '.join(texts)} |", file=sys.stderr, flush=True)
    return {"ok": good == len(CASES), "cases": len(CASES), "same": good}


if __name__ == "__main__":
    cli.run(main)
