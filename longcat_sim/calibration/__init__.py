"""Measurements to op times: laws, fits with held-out error, transfer to other hardware, importers."""

from longcat_sim.calibration.fit_file import write_fit
from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.calibration.roofline import Roofline

__all__ = ["OpTimes", "Roofline", "write_fit"]
