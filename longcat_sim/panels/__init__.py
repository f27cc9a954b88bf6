"""Sliders around figures: plain objects that update a FigureWidget in place, usable without a kernel."""
