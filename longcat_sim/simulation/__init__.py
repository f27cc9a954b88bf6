"""Discrete-event simulation: steps on lanes, and serving."""
