"""Lists, verifies and shows a run's checkpoints."""

from pipeline import cli
from pipeline.commands.checkpoint import main

if __name__ == "__main__":
    cli.run(main)
