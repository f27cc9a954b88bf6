"""``Interval``: a figure with the spread of its draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """Median and 5th and 95th percentile of a figure over its draws."""

    median: float
    p5: float
    p95: float

    @classmethod
    def of(cls, values: Any) -> Interval:
        """Return the interval of draws [N]; one draw is a point."""
        p5, median, p95 = np.quantile(np.asarray(values, dtype=float), (0.05, 0.5, 0.95))
        return cls(float(median), float(p5), float(p95))

    def to_json(self) -> dict[str, float]:
        """Return ``{median, p5, p95}``."""
        return {"median": self.median, "p5": self.p5, "p95": self.p95}

    def show(self, scale: float = 1.0, digits: int = 4) -> str:
        """Return ``median [p5, p95]`` for people."""
        one = f"{self.median * scale:.{digits}g}"
        if self.p5 == self.p95:
            return one
        return f"{one} [{self.p5 * scale:.{digits}g}, {self.p95 * scale:.{digits}g}]"
