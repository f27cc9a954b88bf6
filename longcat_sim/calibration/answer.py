"""``Answer``: which fitted law answers for a kind of op, on which device, and how far it was carried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.laws import Device
from longcat_sim.calibration.table import TimeTable
from longcat_sim.ops.op import Tag

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
