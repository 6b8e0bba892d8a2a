"""Kept for the code of registered versions, which imports it. Use pipeline/track/model_card.py."""

from pipeline.track.model_card import CARD, RAW, WEIGHTS
from pipeline.track.model_card import ModelCard as Card

__all__ = ["CARD", "RAW", "WEIGHTS", "Card"]
