"""``Answer``: which fitted law answers for a kind of op, on which device, and how far it was carried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.laws import Device
from longcat_sim.calibration.table import TimeTable
from longcat_sim.calibration.weights import law_seconds
from longcat_sim.ops.op import FloatArray, Tag

Key = tuple[str, str, str]
"""(kind, dtype, variant)."""


@dataclass
class Answer:
    """How one (kind, dtype, variant) is answered: a law on this hardware, and how far it is from what was measured."""

    law: FittedLaw
    table: TimeTable
    device: Device
    dtype: str
    best: Tag
    reduce: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    """Dims of the asked op -> coordinates of the law."""
    spread: float
    """Standard deviation (log) added because the law was carried to other hardware, precision or variant."""
    origin: str = ""
    """The other device on which it was measured, if it was not on this one."""
    is_edited: bool = False
    """Whether the law is this device's own, and only figures of its data sheet were changed."""

    @property
    def is_far(self) -> bool:
        """Whether held-out errors at measured sizes say too little: the law is of other kernels or cores."""
        return self.best == "extrapolated" and not self.is_edited

    def spread_at(self, points: tuple[FloatArray, ...]) -> FloatArray:
        """Return the standard deviation (log) to add at each point [N].

        Of an edited data sheet it is no more than the edit moves the law: a kernel that waits for memory is as well
        known as before when the peak is twice as high, and one that gains half can lose no more than that.
        """
        if not self.is_edited or not self.spread:
            return np.full(len(points[0]), self.spread)
        law, before = self.law, self.law.reference

        def seconds(device: Device) -> FloatArray:
            return law_seconds(law.weights_, points, law.kind, self.dtype, device)

        # one figure at a time: two edits that cancel are no better known than either
        changed = {name: new for name, new in self.device._asdict().items() if new != getattr(before, name)}
        with np.errstate(divide="ignore", invalid="ignore"):  # an op of no size takes no time
            moved = sum(
                (
                    np.abs(np.log(seconds(before._replace(**{name: new})) / seconds(before)))
                    for name, new in changed.items()
                ),
                np.zeros(len(points[0])),
            )
        return np.minimum(self.spread, np.nan_to_num(moved))
