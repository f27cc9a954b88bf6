"""Decisions: price, search, sensitivity and uncertainty."""
