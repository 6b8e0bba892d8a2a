"""Batch scripts, pre-flight and job status."""
