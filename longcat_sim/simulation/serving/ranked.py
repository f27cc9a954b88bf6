"""Step times of a replica whose attention is data parallel: a prompt is prefilled on one rank, beside the others'.

A mixed step lasts as long as on the rank with the most prompt tokens and the most keys to attend to, while the experts
see the tokens of all ranks. So its time depends on that rank's tokens and keys, and on the *fill*: all ranks' tokens
over those of as many equally full ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Any

import numpy as np

from longcat_sim.simulation.serving.step_times import FloatArray, IntArray, StepTimeGrid

RankedFunction = Callable[..., FloatArray]
"""As ``StepFunction`` and, last, the fill; prefill tokens are those of the fullest rank times the ranks."""


def fill_nodes(ranks: int) -> list[float]:
    """Return shares from one full rank to all; where dense FFNs are cut over ranks, times bend between."""
    return sorted({1.0 / ranks, *(share for share in (4.0 / ranks, 0.25, 0.5) if 1.5 / ranks < share < 0.9), 1.0})


def rank_share(budget: int, ranks: int) -> int:
    """Return the prompt tokens of one rank in one step: an even share (sglang: chunked_prefill_size // dp_size), but
    rounded up, so that all ranks together hold the whole budget."""
    return -(-budget // ranks)


def fullest_ranks(chunks: Sequence[tuple[int, int]], ranks: int, most: int) -> list[tuple[int, int]]:
    """Return (tokens, pairs of query and key) of the ranks that the others may wait for: that with the most tokens,
    and that with the most pairs where it is another.

    Chunks of (tokens, pairs) are dealt out largest first, each to the rank with the fewest tokens; a rank takes at
    most ``most`` (a full one cuts its last chunk), and one of them as much as an even share.
    """
    if len(chunks) <= ranks:
        return list(dict.fromkeys((max(chunks), max(chunks, key=lambda chunk: chunk[1]))))
    held = [(0, rank) for rank in range(ranks)]
    heapify(held)
    pairs_of = [0] * ranks
    for tokens, pairs in sorted(chunks, reverse=True):
        load, rank = held[0]
        pairs_of[rank] += pairs
        heapreplace(held, (load + tokens, rank))
    even = -(-sum(tokens for tokens, _ in chunks) // ranks)
    all_ranks = [(min(load, most), round(pairs_of[rank] * min(1.0, most / load))) for load, rank in held]
    tokens, pairs = max(all_ranks)
    longest = max(all_ranks, key=lambda rank: rank[1])
    return list(dict.fromkeys(((max(tokens, even), pairs), longest)))


@dataclass(frozen=True)
class RankedStepTimes:
    """A ``StepTimeGrid`` of one rank's tokens for each fill; look-ups between two are linear."""

    ranks: int
    fills: list[float]
    grids: list[StepTimeGrid]
    interpolation_error: float
    """95th percentile of the relative error half-way between nodes, measured when the grids were built."""
    is_detailed: bool = False

    @classmethod
    def from_function(cls, f: RankedFunction, ranks: int, **sizes: Any) -> RankedStepTimes:
        """Evaluate ``f`` at every fill on the grid that ``sizes`` describe (see ``StepTimeGrid.from_function``).

        ``max_prefill_tokens`` is that of one rank.
        """

        def at(fill: float) -> Callable[..., FloatArray]:
            return lambda batch, context, tokens, keys: f(batch, context, tokens * ranks, keys, fill)

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

    def ranked_ns(self, batch: int, total_context: int, tokens: int, fullest: int, pairs: int) -> int:
        """Return the time of a step that prefills ``tokens`` on all ranks; the one that the others wait for has
        ``fullest`` of them, whose queries attend to ``pairs`` keys in all."""
        fill, fills = min(1.0, tokens / (fullest * self.ranks)), self.fills
        k = min(max(bisect_right(fills, fill) - 1, 0), len(fills) - 2)
        low = self.grids[k].mixed_ns(batch, total_context, fullest, pairs)
        high = self.grids[k + 1].mixed_ns(batch, total_context, fullest, pairs)
        return round(low + (high - low) * ((fill - fills[k]) / (fills[k + 1] - fills[k])))

    def dealt_ns(self, batch: int, total_context: int, chunks: Sequence[tuple[int, int]], most: int) -> tuple[int, int]:
        """Return the time of a step with chunks of (tokens, tokens before them), and the fullest rank's tokens."""
        each = [(count, count * before + (count * (count + 1) >> 1)) for count, before in chunks]
        total, waited = sum(count for count, _ in chunks), fullest_ranks(each, self.ranks, most)
        return max(self.ranked_ns(batch, total_context, total, *rank) for rank in waited), waited[0][0]

    def is_outside(self, batch: int, total_context: int, fullest: int) -> bool:
        """Whether the step lies outside the nodes."""
        return self.grids[-1].is_outside(batch, total_context, fullest)
