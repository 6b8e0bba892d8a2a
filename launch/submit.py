"""Submit a run to SLURM, and look after it."""

from pipeline import cli
from pipeline.commands.submit import main

if __name__ == "__main__":
    cli.run(main)
