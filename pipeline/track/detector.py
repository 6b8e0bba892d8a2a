"""Kept for the code of registered versions, which imports it. Use pipeline/track/serve/detector.py."""

from pipeline.track.serve.detector import ServedDetector as Detector

__all__ = ["Detector"]
