"""A slow function of sliders, solved at fixed places along the one that moves and read in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

from longcat_sim.ops.op import FloatArray

PER_DECADE = 12
"""Places per factor of ten: between two of them a step's time is a power law to half a percent (a test holds it)."""
MOST_KEPT = 4096


class Knots:
    """Values along a positive argument, linear in the logarithms between knots; each knot is solved once and kept."""

    def __init__(self, per_decade: int = PER_DECADE) -> None:
        self.per_decade = per_decade
        self._solved: dict[tuple[Hashable, int], FloatArray] = {}
        self._knob = ""

    def along(
        self, factors: Mapping[str, float], moved: Sequence[str], others: Hashable,
        solve: Callable[[Mapping[str, float]], FloatArray],
    ) -> FloatArray:  # fmt: skip
        """Return positive values at positive ``factors``, read along the one that moved last (``moved``, else before).

        Where all factors are 1 this is what ``solve`` gives there.
        """
        self._knob = knob = next(
            (name for name in reversed(moved) if name in factors), self._knob or next(iter(factors))
        )
        rest = tuple(factor for name, factor in factors.items() if name != knob)
        return self.read((others, knob, rest), factors[knob], lambda at: solve({**factors, knob: at}))

    def read(self, others: Hashable, at: float, solve: Callable[[float], FloatArray]) -> FloatArray:
        """Return positive values at ``at``; ``others`` names everything else that ``solve`` depends on.

        An argument of 1, and every knot, gives what ``solve`` gives there.
        """
        place = math.log10(at) * self.per_decade
        low = math.floor(place + 1e-9)
        left = self._knot(others, low, solve)
        share = place - low
        if share < 1e-9:
            return left
        return left ** (1 - share) * self._knot(others, low + 1, solve) ** share

    def _knot(self, others: Hashable, number: int, solve: Callable[[float], FloatArray]) -> FloatArray:
        if (others, number) not in self._solved:
            if len(self._solved) >= MOST_KEPT:
                self._solved.clear()
            self._solved[others, number] = solve(10 ** (number / self.per_decade))
        return self._solved[others, number]
