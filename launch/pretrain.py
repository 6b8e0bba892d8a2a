"""Pretrain a backbone.

deepspeed launch/pretrain.py --config configs/pretrain/NAME.yaml [--set key=value …]
"""

import argparse
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
    try:
        settings = command.first_then_all(here, lambda: config.load(arguments.config, arguments.set))
        return run_job(settings, here)
    finally:
        world.stop()


if __name__ == "__main__":
    command.run(main)
