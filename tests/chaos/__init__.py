"""Failures on purpose: whole runs that are killed, saves that crash, disks that fill up. Nothing is simulated."""
