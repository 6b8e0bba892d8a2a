"""SLURM: the batch script, the pre-flight of nodes, the supervisor of a job, and a run's status."""
