"""Op times of a device, made once."""

from __future__ import annotations

from longcat_sim.calibration import OpTimes
from longcat_sim.specs.hardware import HardwareSpec

MOST_KEPT = 64
_made: dict[tuple[str, int], OpTimes] = {}


def op_times_of(hardware: HardwareSpec) -> OpTimes:
    """Return the op times of a device's profile, fit included; the same object for the same figures."""
    key = (hardware.model_dump_json(exclude={"fit", "sources", "notes"}), id(hardware.fit))
    if key not in _made:
        if len(_made) >= MOST_KEPT:
            _made.pop(next(iter(_made)))
        _made[key] = OpTimes.from_hardware(hardware)  # keeps the fit, so that its id stays its own
    return _made[key]
