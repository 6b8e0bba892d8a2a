"""Pretrain a backbone.

deepspeed launch/pretrain.py --config configs/pretrain/NAME.yaml [--set key=value …]
"""

import argparse
import sys
from typing import Any

from launch import command
from launch.job import run_job
from pipeline import config, world


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="Pretrain a backbone.")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    here = world.start()
    settings = command.first_then_all(here, lambda: config.load(arguments.config, arguments.set))
    result = run_job(settings, here)
    stopped = here.from_first(bool(result and result.get("requeue")))
    world.stop()
    if stopped and result is None:
        sys.exit(command.REQUEUE)
    return result


if __name__ == "__main__":
    command.run(main)
