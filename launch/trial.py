"""Runs one rank of a trial of `launch/doctor.py --tune`."""

from pipeline import cli
from pipeline.job.tune_trial import main

if __name__ == "__main__":
    cli.run(main)
