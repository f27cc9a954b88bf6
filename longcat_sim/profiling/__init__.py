"""Time the executable model's operators, collectives and whole steps on this machine."""

from longcat_sim.profiling.profile import profile

__all__ = ["profile"]
