"""This module stays for versions registered earlier, whose code imports it. Use pipeline/track/serve/classifier.py."""

from pipeline.track.serve.classifier import ServedClassifier as Classifier

__all__ = ["Classifier"]
