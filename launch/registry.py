"""Look at registered models, check them, trace them, make one the champion, and bring in others' weights."""

from pipeline import cli
from pipeline.commands.registry import main

if __name__ == "__main__":
    cli.run(main)
