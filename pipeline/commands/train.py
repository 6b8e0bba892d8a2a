"""What pretrain.py and finetune.py share: from the command line to the job, and from its end to those that follow."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config import Config, load_config
from pipeline.errors import REQUEUE, InputError
from pipeline.job import handoff


def start(prog: str, description: str, *, fine_tuning: bool) -> dict[str, Any] | None:
    """Run the job that the command line describes. Returns the result on rank 0."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--ranks", type=int, metavar="N", help="refuse to run with any other number of ranks")
    parser.add_argument("--no-handoff", action="store_true", help="leave the jobs under handoff to somebody else")
    parser.add_argument("--claim", type=Path, metavar="FILE", help="the hand-off that this job answers to")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    if arguments.ranks is not None:
        _require_ranks(arguments.ranks)
    read = cli.read_early(lambda: _read(arguments, fine_tuning))
    from pipeline import world  # which imports torch, for nothing where a setting is wrong

    here = world.start()
    config, claim = read(here)
    from pipeline.job.training_job import run_job  # which imports DeepSpeed and DALI, in some seconds

    result = run_job(config, here, claim)
    stopped = here.from_first(bool(result and result.get("requeue")))
    world.stop()
    if stopped and result is None:
        sys.exit(REQUEUE)
    if result and result.get("model") and config.handoff and not arguments.no_handoff:
        handoff.start_handoffs(config.run.folder, here.local_size)
    return result


def _require_ranks(ranks: int) -> None:
    """Raises InputError where the launcher starts another number of ranks, before any waits for the others."""
    from pipeline import world

    place = world.read_place(world.launcher_variables(os.environ))
    if ranks != place.size:
        raise InputError(
            f"--ranks {ranks}: the launcher names {place.size}: start as many as there should be, with srun, "
            "torchrun or deepspeed; in a shell of several tasks (srun --pty) `srun --ntasks=1 --overlap` starts one"
        )


def _read(arguments: argparse.Namespace, fine_tuning: bool) -> tuple[Config, handoff.Claim | None]:
    claim = handoff.Claim.read(arguments.claim) if arguments.claim else None
    config = load_config(arguments.config, arguments.set)
    if (config.init is not None) != fine_tuning:
        raise InputError(
            f"{arguments.config}: init.model is {'missing: it names' if fine_tuning else 'given, but is'} what a "
            f"fine-tuning run starts from{'' if fine_tuning else ': use launch/finetune.py'}"
        )
    return config, claim
