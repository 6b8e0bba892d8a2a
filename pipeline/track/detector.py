"""This module stays for versions registered earlier, whose code imports it for all detectors."""

from pipeline.track.serve.served_model import served_network as Detector

__all__ = ["Detector"]
