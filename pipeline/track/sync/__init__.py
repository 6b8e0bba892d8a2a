"""A run's folder on the MLflow server: what is recorded locally, and how it is sent."""
