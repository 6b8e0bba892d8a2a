"""Writes scikit-learn's digits as JPEG files in one folder for each class: the demo's images."""

from pipeline import cli
from pipeline.commands.digits import main

if __name__ == "__main__":
    cli.run(main)
