"""Says what a registered model sees in pictures: labels, boxes, maps or features."""

from pipeline import cli
from pipeline.commands.predict import main

if __name__ == "__main__":
    cli.run(main)
