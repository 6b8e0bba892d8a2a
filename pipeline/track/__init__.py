"""Runs and the model registry. The only importer of mlflow."""
