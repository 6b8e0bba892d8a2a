"""One training job: its checks before the start, the assembly of its parts, its publications and what follows it."""
