"""The command of pretrain.py and finetune.py: parses the command line, runs the job, and starts its hand-offs."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.commands.endings import describe_training
from pipeline.config import Config
from pipeline.errors import REQUEUE, InputError
from pipeline.job import handoff


def start(prog: str, description: str, *, fine_tuning: bool) -> dict[str, Any] | None:
    """Runs the job that the command line describes. Returns the result on rank 0."""
    parser = cli.make_parser(prog, description)
    cli.add_config(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="refuse to run with any other number of ranks")
    parser.add_argument("--no-handoff", action="store_true", help="do not start the jobs under handoff")
    parser.add_argument("--claim", type=Path, metavar="FILE", help="claim of the hand-off that this job trains")
    # The deepspeed launcher adds this option.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks is not None:
        _require_ranks(arguments.ranks)
    # The configuration comes before torch, which takes seconds to import, so that a mistake is reported at once.
    finish_reading = cli.read_early(lambda: _read_configuration(arguments, fine_tuning))
    from pipeline import world

    here = world.start()
    config, claim = finish_reading(here)
    # Imported late: DeepSpeed and DALI take seconds.
    from pipeline.job.training_job import run_job

    result = run_job(config, here, claim)
    stopped = here.from_first(bool(result and result.get("requeue")))
    world.stop()
    # All ranks end with the same code, and rank 0 with its result.
    if stopped and result is None:
        sys.exit(REQUEUE)
    if result:
        cli.show(describe_training(result, config))
    if result and result.get("model") and config.handoff and not arguments.no_handoff:
        handoff.start_handoffs(config.run.folder, here.local_size)
    return result


def _require_ranks(ranks: int) -> None:
    """Raises InputError where the launcher starts another number of ranks, before one waits for the others."""
    from pipeline import world

    place = world.read_world(world.launcher_variables(os.environ))
    if ranks != place.size:
        raise InputError(
            f"--ranks {ranks}: the launcher names {place.size}: start as many as there should be, with srun, "
            "torchrun or deepspeed; in a shell of several tasks (srun --pty) `srun --ntasks=1 --overlap` starts one"
        )


def _read_configuration(arguments: argparse.Namespace, fine_tuning: bool) -> tuple[Config, handoff.Claim | None]:
    claim = handoff.Claim.read(arguments.claim) if arguments.claim else None
    config = cli.read_config(arguments)
    if fine_tuning and config.init is None:
        raise InputError(f"{arguments.config}: init.model is missing: it names what a fine-tuning run starts from")
    if config.init is not None and not fine_tuning:
        raise InputError(
            f"{arguments.config}: init.model is given, but is what a fine-tuning run starts from: use "
            "launch/finetune.py"
        )
    return config, claim
