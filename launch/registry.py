"""Manages registered models: lists, verifies, traces, promotes, imports and exports their versions."""

from pipeline import cli
from pipeline.commands.registry import main

if __name__ == "__main__":
    cli.run(main)
