"""This module stays for versions registered earlier, whose code imports it. Use pipeline/track/serve/segmenter.py."""

from pipeline.track.serve.segmenter import ServedSegmenter as Segmenter

__all__ = ["Segmenter"]
