"""The names that the code of registered models imports. They never change: each version keeps the code of its time."""

from pipeline.track.serve.served_model import ServedModel

__all__ = ["ServedModel"]
