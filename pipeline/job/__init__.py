"""One training job: its checks before the start, its assembly, its publications and the jobs that follow it."""
