"""Starts the fine-tuning jobs that a run hands off to."""

from pipeline import cli
from pipeline.commands.handoff import main

if __name__ == "__main__":
    cli.run(main)
