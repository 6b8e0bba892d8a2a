"""Writes a run as one HTML page that needs no network, or several runs side by side."""

from pipeline import cli
from pipeline.commands.report import main

if __name__ == "__main__":
    cli.run(main)
