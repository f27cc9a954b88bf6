"""Curves of collectives: seconds over bytes of one (kind, variant, ranks), from measured points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longcat_sim.calibration.importers.exchange import Point
from longcat_sim.ops.op import FloatArray

if TYPE_CHECKING:
    from longcat_sim.calibration.collectives import CollectiveTimes


@dataclass(frozen=True)
class Curve:
    """Seconds over bytes of one (kind, variant, ranks): sorted points, joined by straight lines."""

    kind: str
    variant: str
    ranks: int
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    sources: tuple[str, ...] = ()
    borrowed: str = ""
    """Device whose sweep gave the empty message's time, if not this one."""

    def at(self, size: FloatArray) -> FloatArray:
        """Return seconds [N]; beyond the last point the last slope goes on, before the first the first."""
        x, y = np.array(self.bytes), np.array(self.seconds)
        if len(x) == 1:
            return np.full(size.shape, y[0])
        inner = np.interp(size, x, y)
        last = (y[-1] - y[-2]) / (x[-1] - x[-2])
        first = max(0.0, (y[1] - y[0]) / (x[1] - x[0]))
        result = np.where(size > x[-1], y[-1] + last * (size - x[-1]), inner)
        return np.where(size < x[0], np.maximum(y[0] + first * (size - x[0]), 0.5 * y[0]), result)

    @property
    def floor_s(self) -> float:
        """Time of an empty message."""
        return float(self.at(np.zeros(1))[0])


def fit_curves(points: Iterable[Point], empty: Mapping[tuple[str, str], CollectiveTimes | None]) -> list[Curve]:
    """Return one curve per (kind, variant, ranks).

    ``empty`` gives, per (kind, variant), the times of the device to borrow the empty message from where a table holds
    one size. Repeated sizes are averaged; a time that falls with size is held (noise of small messages).
    """
    grouped: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    sources: dict[tuple[str, str, int], list[str]] = {}
    for point in points:
        key = (point.kind, point.variant, point.ranks)
        grouped.setdefault(key, {}).setdefault(point.bytes, []).append(point.seconds)
        sources.setdefault(key, []).append(point.source)
    curves = []
    for (kind, variant, ranks), sizes in sorted(grouped.items()):
        x = sorted(sizes)
        y = np.maximum.accumulate([float(np.mean(sizes[size])) for size in x]).tolist()
        borrowed = ""
        lender = empty.get((kind, variant))
        if len(x) == 1 and lender is not None:
            floor = lender.floor_s(kind, variant, ranks)
            if 0 < floor < y[0]:
                x, y, borrowed = [0.0, *x], [floor, *y], lender.hardware.name
        used = tuple(dict.fromkeys(sources[kind, variant, ranks]))
        curves.append(Curve(kind, variant, ranks, tuple(x), tuple(y), used, borrowed))
    return curves
