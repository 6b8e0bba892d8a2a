"""Submits a run to SLURM; shows its status and log, and stops it."""

from pipeline import cli
from pipeline.commands.submit import main

if __name__ == "__main__":
    cli.run(main)
