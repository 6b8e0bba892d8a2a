"""A CUDA runtime on which nothing is computed, to run and count what the host does on a machine without a GPU."""
