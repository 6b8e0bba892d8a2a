"""Kept for the code of registered versions, which imports it. Use pipeline/track/serve/segmenter.py."""

from pipeline.track.serve.segmenter import ServedSegmenter as Segmenter

__all__ = ["Segmenter"]
