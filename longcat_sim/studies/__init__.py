"""Compose the floors: the only place where measurement, fit, simulation and price meet."""
