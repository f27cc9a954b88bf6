"""Section ``transfer``: op times of a system that no fit has seen, predicted from the fits of two others.

Each source's law is scaled by the data sheets of source and target (peak, bandwidth, SMs, cache), and the predictions
are averaged in the logarithm, weighted by the inverse square of the distance: kernels are written for an architecture,
so a source of another one says little where one of the same is there. They are compared with the target's own fit at
sizes that were measured there. Data sheets are used; no figure of the target's fit is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.op_times import device_of
from longcat_sim.errors import SpecError
from longcat_sim.ops.op import FloatArray
from longcat_sim.specs.hardware import HardwareSpec, load_hardware
from longcat_sim.studies.validate.section import Row, Section

CASES: tuple[tuple[tuple[str, str], str], ...] = (
    (("a100-sxm", "h200-sxm"), "h100-sxm"),
    (("h100-sxm", "h200-sxm"), "b200-sxm"),
)
LIMIT = 0.12
"""Median |error| over all op kinds of a case."""
POINTS = 400
"""Sizes compared per law."""
NEAR = 0.1
"""Octaves added to a source's distance, so that an equal device does not count for ever."""


def run() -> Section:
    """Return the transfer table: median |error| per kind, and over the kinds of a case."""
    section = Section("transfer", "Op times of an unseen system, predicted from two others (median |error|)")
    for sources, target in CASES:
        name = f"{' + '.join(sources)} -> {target}"
        rows = transfer_errors(sources, target)
        for label, errors in rows.items():
            signed = float(np.median(errors))
            median = float(np.median(np.abs(errors)))
            note = f"{len(errors)} sizes, signed {signed:+.1%}"
            section.rows.append(Row(f"{name}: {label}", "ratio", median, error=median, note=note))
        if rows:
            median = float(np.median([np.median(np.abs(errors)) for errors in rows.values()]))
            section.rows.append(Row(f"{name}: all kinds", "ratio", median, error=median, limit=LIMIT))
        else:
            section.notes.append(f"{name}: no kind is fitted on all three")
    return section


def transfer_errors(sources: Sequence[str], target: str) -> dict[str, FloatArray]:
    """Return predicted / measured - 1 at measured sizes of the target, per kind and dtype that a source has."""
    hardware = load_hardware(target)
    own = OpTimes.from_hardware(hardware)
    others = [OpTimes.from_hardware(load_hardware(name)) for name in sources]
    found = {}
    for key, law in own.laws_.items():
        givers = [times.laws_[key] for times in others if key in times.laws_]
        if law.transferred_from or not givers:
            continue
        points = measured_points(law)
        truth = law.table(law.reference).many(points)
        total, weights = np.zeros(len(truth)), 0.0
        for giver in givers:
            try:
                carried = giver.table(device_of(hardware, giver.dtype)).many(points)
            except SpecError:
                continue
            weight = 1.0 / (NEAR + distance(giver, hardware)) ** 2
            total += weight * np.log(carried)
            weights += weight
        if weights:
            found[" ".join(filter(None, key))] = np.exp(total / weights) / truth - 1
    return found


def distance(law: FittedLaw, hardware: HardwareSpec) -> float:
    """Return how far a device is from a law's own, in octaves of peak and bandwidth."""
    device = device_of(hardware, law.dtype)
    return abs(math.log2(device.peak / law.reference.peak)) + abs(math.log2(device.bandwidth / law.reference.bandwidth))


def measured_points(law: FittedLaw) -> list[FloatArray]:
    """Return up to ``POINTS`` sizes of the law's grid that were measured [coordinates][N]."""
    cells = np.argwhere(law.measured_)
    rows = np.random.default_rng(0).permutation(len(cells))[:POINTS]
    return [axis[cells[rows, i]] for i, axis in enumerate(law.axes_)]
