"""Tars at rest: packing them, the index of what lies where, and reading their bytes."""
