"""The command that a batch script of launch/submit.py or slurm/ runs: see pipeline/cluster/supervise.py."""

from pipeline import cli
from pipeline.commands.supervise import main

if __name__ == "__main__":
    cli.run(main)
