"""Scores a registered model on a packed data set, draws its predictions, or probes its frozen features."""

from pipeline import cli
from pipeline.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
