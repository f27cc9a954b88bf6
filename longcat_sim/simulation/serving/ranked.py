"""Step times of a replica whose attention is data parallel: a prompt is prefilled on one rank, beside the others'.

A mixed step lasts as long as on the rank with the most prompt tokens, while the experts see the tokens of all ranks.
So its time depends on that rank's tokens and on the *fill*: all ranks' tokens over those of as many equally full ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from longcat_sim.simulation.serving.step_times import FloatArray, IntArray, StepTimeGrid

RankedFunction = Callable[..., FloatArray]
"""As ``StepFunction`` and, last, the fill; prefill tokens are those of the fullest rank times the ranks."""


def fill_nodes(ranks: int) -> list[float]:
    """Return shares from one full rank to all: two, and the geometric middle of a wide replica."""
    return [1.0 / ranks, *([ranks**-0.5] if ranks >= 8 else []), 1.0]


@dataclass(frozen=True)
class RankedStepTimes:
    """A ``StepTimeGrid`` for each fill; look-ups between two are linear. Build it with ``from_function``."""

    ranks: int
    fills: list[float]
    grids: list[StepTimeGrid]
    interpolation_error: float
    """95th percentile of the relative error half-way between nodes, measured when the grids were built."""
    is_detailed: bool = False

    @classmethod
    def from_function(cls, f: RankedFunction, ranks: int, **sizes: Any) -> RankedStepTimes:
        """Evaluate ``f`` at every fill on the grid that ``sizes`` describe (see ``StepTimeGrid.from_function``)."""

        def at(fill: float) -> Callable[..., FloatArray]:
            return lambda *args: f(*args, fill)

        fills = fill_nodes(ranks)
        grids = [StepTimeGrid.from_function(at(fill), **sizes) for fill in fills]
        made = cls(ranks, fills, grids, 0.0)
        middles = [(low + high) / 2 for low, high in pairwise(fills)]
        between = [abs(made._between(at(middle), k)) for k, middle in enumerate(middles)]
        error = max([grid.interpolation_error for grid in grids] + [float(np.quantile(b, 0.95)) for b in between])
        return replace(made, interpolation_error=error)

    def _between(self, f: Callable[..., FloatArray], k: int, points: int = 64) -> FloatArray:
        """Return the relative errors half-way between two fills, at nodes of all other axes."""
        draw = np.random.Generator(np.random.Philox(key=[1, 3]))
        first, second = self.grids[k : k + 2]
        nodes = (first.batch_nodes, first.context_nodes, first.prefill_nodes, first.key_nodes)
        b, c, p, q = (draw.choice(np.array(axis, dtype=float), points) for axis in nodes)
        grids = [
            np.array([grid.mixed_ns(int(x), int(x * y), int(z), z * w) for x, y, z, w in zip(b, c, p, q, strict=True)])
            for grid in (first, second)
        ]
        return np.asarray((grids[0] + grids[1]) / 2e9 / f(b, c, p, q) - 1)

    def scaled(self, factor: float) -> RankedStepTimes:
        """Return the grids with all times multiplied: one draw of a common error."""
        return replace(self, grids=[grid.scaled(factor) for grid in self.grids])

    def decode_ns(self, batch: int, total_context: int) -> int:
        """Return the time of one decode step."""
        return self.grids[-1].decode_ns(batch, total_context)

    def decode_run_ns(self, batch: int, total_context: int, num_steps: int) -> list[int] | IntArray:
        """Return the times of ``num_steps`` decode steps in which every sequence grows by one token."""
        return self.grids[-1].decode_run_ns(batch, total_context, num_steps)

    def decode_many_ns(self, batch: int, total_contexts: IntArray) -> IntArray:
        """Return the times of decode steps of one batch [N]."""
        return self.grids[-1].decode_many_ns(batch, total_contexts)

    def mixed_ns(self, batch: int, total_context: int, prefill_tokens: int, pairs: int, fullest: int) -> int:
        """Return the time of a step that prefills ``prefill_tokens``, ``fullest`` of them on one rank."""
        padded = fullest * self.ranks
        fill = prefill_tokens / padded
        keys = pairs * (padded / prefill_tokens)
        fills = self.fills
        k = min(max(bisect_right(fills, fill) - 1, 0), len(fills) - 2)
        low = self.grids[k].mixed_ns(batch, total_context, padded, keys)
        high = self.grids[k + 1].mixed_ns(batch, total_context, padded, keys)
        return round(low + (high - low) * ((fill - fills[k]) / (fills[k + 1] - fills[k])))

    def is_outside(self, batch: int, total_context: int, prefill_tokens: int) -> bool:
        """Whether the step lies outside the nodes; tokens are those of the fullest rank times the ranks."""
        return self.grids[-1].is_outside(batch, total_context, prefill_tokens)
