"""This module stays for versions registered earlier, whose code imports it. Use pipeline/track/serve/detector.py."""

from pipeline.track.serve.detector import ServedDetector as Detector

__all__ = ["Detector"]
