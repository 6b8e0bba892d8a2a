"""The training loop and what it stands on. The only importer of deepspeed."""
