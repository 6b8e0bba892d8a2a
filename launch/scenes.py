"""Writes scenes of handwritten digits on photographs, as data for dense tasks."""

from pipeline import cli
from pipeline.commands.scenes import main

if __name__ == "__main__":
    cli.run(main)
