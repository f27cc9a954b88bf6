"""The main job: measure, fit, check three times, simulate 128 GPUs, serve an hour, price a token, report."""

from longcat_sim.studies.quickstart.run import Quickstart, quickstart

__all__ = ["Quickstart", "quickstart"]
