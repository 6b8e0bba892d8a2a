"""This module stays for versions registered earlier, whose code imports it. Use pipeline/track/model_card.py."""

from pipeline.track.model_card import CARD, RAW, WEIGHTS
from pipeline.track.model_card import ModelCard as Card

__all__ = ["CARD", "RAW", "WEIGHTS", "Card"]
