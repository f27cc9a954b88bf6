"""Speculative decoding: how many tokens each step of each sequence emits, drawn by counter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longcat_sim.simulation.serving import draws
from longcat_sim.simulation.serving.step_times import IntArray


class Drafts:
    """Emitted tokens of one replica's decode steps, summed over its batch, by step number.

    ``acceptance`` is conditional by position: the second draft is looked at only if the first was accepted.
    """

    def __init__(self, acceptance: Sequence[float], seed: int) -> None:
        self.acceptance = np.array(acceptance)
        self.num_tokens = len(acceptance)
        self.seed = seed
        self.base = 0
        self.growth = np.zeros(4096, dtype=np.int64)

    def cumulative(self, request: int, emitted: int, left: int) -> IntArray:
        """Return the tokens emitted after 0, 1, 2, .. steps until ``left`` are out; draws go by token number."""
        d = self.num_tokens
        uniforms = draws.uniforms(draws.key(self.seed, draws.ACCEPT, request), emitted * d, left * d)
        accepted = np.cumprod(uniforms.reshape(left, d) < self.acceptance, axis=1).sum(axis=1)
        total = np.cumsum(accepted + 1)
        steps = int(np.searchsorted(total, left)) + 1
        result = np.zeros(steps + 1, dtype=np.int64)
        result[1:] = total[:steps]
        result[-1] = left
        return result

    def add(self, step: int, cumulative: IntArray, start: int = 0) -> None:
        """Count a sequence in from ``step`` on, of whose steps ``start`` are over."""
        self._room(step, len(cumulative))
        at = step - self.base
        self.growth[at : at + len(cumulative) - 1 - start] += np.diff(cumulative[start:])

    def remove(self, step: int, cumulative: IntArray, start: int) -> None:
        """Count out what a sequence would still have emitted."""
        if start < len(cumulative) - 1:
            at = step - self.base
            self.growth[at : at + len(cumulative) - 1 - start] -= np.diff(cumulative[start:])

    def _room(self, step: int, length: int) -> None:
        """Drop steps that are over and make room for ``length`` more."""
        if step - self.base + length < len(self.growth):
            return
        kept = self.growth[step - self.base :]
        self.growth = np.zeros(max(4096, 2 * (len(kept) + length)), dtype=np.int64)
        self.growth[: len(kept)] = kept
        self.base = step

    def contexts(self, step: int, total: int, num_steps: int) -> IntArray:
        """Return the total context before each of ``num_steps`` steps."""
        at = step - self.base
        contexts = np.full(num_steps, total, dtype=np.int64)
        if num_steps > 1:
            contexts[1:] += np.cumsum(self.growth[at : at + num_steps - 1])
        return contexts

    def grown(self, step: int, num_steps: int) -> int:
        """Return the tokens that ``num_steps`` steps emit."""
        at = step - self.base
        return int(self.growth[at : at + num_steps].sum())
