"""Parameters of a served model for requests that do not give them."""

TOP_K = 5
"""Number of labels in an answer."""
MIN_SCORE = 0.05
"""Lowest score of a box in an answer."""
