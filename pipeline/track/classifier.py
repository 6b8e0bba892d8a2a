"""Kept for the code of registered versions, which imports it. Use pipeline/track/serve/classifier.py."""

from pipeline.track.serve.classifier import ServedClassifier as Classifier

__all__ = ["Classifier"]
