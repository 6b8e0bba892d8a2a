"""Write scenes of handwritten digits on photographs, to learn dense tasks from."""

from pipeline import cli
from pipeline.commands.scenes import main

if __name__ == "__main__":
    cli.run(main)
