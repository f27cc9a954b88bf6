"""``Samples``: what a clock has taken of one callable, by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Samples:
    """Seconds per call, one list per round."""

    rounds: list[list[float]] = field(default_factory=list)
    probes: list[tuple[float, ...]] = field(default_factory=list)
    """Median seconds of each probe (``profiling.pace``) in each round; empty where none ran (a GPU, several ranks)."""

    @property
    def flat(self) -> list[float]:
        """All samples."""
        return [sample for part in self.rounds for sample in part]

    def quantiles(self) -> tuple[float, float, float]:
        """Return p10, median and p90."""
        p10, median, p90 = np.quantile(self.flat, [0.1, 0.5, 0.9])
        return float(p10), float(median), float(p90)

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        p10, median, p90 = self.quantiles()
        return (p90 - p10) / median

    def minus(self, other: Samples) -> Samples:
        """Return these times less the median of ``other`` in the same round, a tenth of them at least."""
        rounds = []
        for mine, theirs in zip(self.rounds, other.rounds, strict=True):
            less = float(np.median(theirs))
            rounds.append([max(sample - less, 0.1 * sample) for sample in mine])
        return Samples(rounds, self.probes)

    def times(self, factors: Sequence[float]) -> Samples:
        """Return these times with each round scaled by a factor of its own."""
        rounds = [[sample * factor for sample in part] for part, factor in zip(self.rounds, factors, strict=True)]
        return Samples(rounds, self.probes)


def merged(samples: Iterable[Samples]) -> Samples:
    """Return the rounds of all."""
    found = list(samples)
    return Samples([part for each in found for part in each.rounds], [probe for each in found for probe in each.probes])
