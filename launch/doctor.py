"""Whether this machine is ready, or the nodes of a SLURM job are."""

from pipeline import cli
from pipeline.commands.doctor import main

if __name__ == "__main__":
    cli.run(main)
