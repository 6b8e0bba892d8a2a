"""Write scikit-learn's digits as a class-per-folder JPEG tree: the demo's images."""

from pipeline import cli
from pipeline.commands.digits import main

if __name__ == "__main__":
    cli.run(main)
