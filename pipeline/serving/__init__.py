"""What the code of registered models imports, by names that stay: versions keep the code of their day."""

from pipeline.track.serve.served_model import ServedModel

__all__ = ["ServedModel"]
