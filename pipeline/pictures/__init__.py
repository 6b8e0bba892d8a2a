"""Draws pictures for people: contact sheets, class colours, boxes and masks."""
