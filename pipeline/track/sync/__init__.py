"""A run's record in its own folder, and MLflow's copy of that folder."""
