"""Runs on a real SLURM cluster, which the fixture in conftest.py starts on loopback."""
