"""What a served model answers with where a request does not say."""

TOP_K = 5
"""Number of labels."""
MIN_SCORE = 0.05
"""Lowest score of a box."""
