"""Checks whether this machine, or the nodes of a SLURM job, are ready for training."""

from pipeline import cli
from pipeline.commands.doctor import main

if __name__ == "__main__":
    cli.run(main)
