"""This module stays for versions registered earlier, whose code imports it. Use pipeline/track/serve/defaults.py."""

from pipeline.track.serve.defaults import TOP_K

__all__ = ["TOP_K"]
