"""Predictions beside published and measured results, one section per file."""
