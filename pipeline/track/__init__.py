"""Experiment tracking and the model registry. This package alone imports MLflow."""
