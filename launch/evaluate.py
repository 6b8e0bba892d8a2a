"""Score a registered model on a packed data set, draw what it predicts, or probe its frozen features."""

from pipeline import cli
from pipeline.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
