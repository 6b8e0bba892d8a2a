"""Makes, verifies and shows data sets."""

from pipeline import cli
from pipeline.commands.shards import main

if __name__ == "__main__":
    cli.run(main)
