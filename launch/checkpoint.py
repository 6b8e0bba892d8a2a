"""Look at a run's checkpoints and check them."""

from pipeline import cli
from pipeline.commands.checkpoint import main

if __name__ == "__main__":
    cli.run(main)
