"""How many keys a query keeps, and where each query stands in its context.

Shape letters: B sequences, Q queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longcat_sim.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How many keys to keep: a ``ratio`` of the visible context, or a ``count``. Give exactly one."""

    ratio: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            raise ModelError(
                f"Keep: expected one of ratio and count, such as Keep(ratio=0.05) or Keep(count=2048); got "
                f"ratio={self.ratio}, count={self.count}"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ModelError(f"ratio: expected a number in (0, 1], such as 0.05; got {self.ratio}")
        if self.count is not None and (isinstance(self.count, bool) or int(self.count) != self.count or self.count < 1):
            raise ModelError(f"count: expected a whole number >= 1, such as 2048; got {self.count}")

    def of(self, visible: Tensor) -> Tensor:
        """Return the keys kept of contexts of ``visible`` keys: at least one, at most all (same shape)."""
        if self.count is not None:
            return visible.clamp(max=self.count)
        ratio = float(self.ratio or 1.0)
        return torch.minimum((visible.double() * ratio + 0.5).floor().long().clamp(min=1), visible)

    def of_context(self, context: int) -> int:
        """Return the keys kept of one context."""
        if context < 1:
            raise ModelError(f"context: expected at least one key; got {context}")
        if self.count is not None:
            return min(self.count, context)
        return min(max(1, math.floor(context * float(self.ratio or 1.0) + 0.5)), context)


class Rows(NamedTuple):
    """Where the queries of one call stand."""

    position_BQ: Tensor
    """Place of each query in its context: it sees keys 0..position."""
    kept_BQ: Tensor
    """Keys it keeps."""
    first: int = 0
    """Number of the first of these queries within the whole call, for selectors that hold their own queries."""

    @property
    def most_kept(self) -> int:
        """Return the largest number of keys that a row keeps."""
        return int(self.kept_BQ.max())

    @property
    def keeps_all(self) -> bool:
        """Return whether every row keeps all that it sees, so that dense attention is the answer."""
        return bool((self.kept_BQ > self.position_BQ).all())

    def visible(self, keys: int) -> Tensor:
        """Return which keys each query sees [B, Q, keys]."""
        return torch.arange(keys, device=self.position_BQ.device) <= self.position_BQ[..., None]

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start..stop."""
        return Rows(self.position_BQ[:, start:stop], self.kept_BQ[:, start:stop], self.first + start)


def rows_of(keep: Keep, *, batch: int, queries: int, keys: int, positions: Tensor | None, device: torch.device) -> Rows:
    """Return the rows of a call; without ``positions`` the queries are the last of the context.

    Raises:
        ModelError: empty context, or a position outside it.
    """
    if keys < 1 or queries < 1 or batch < 1:
        raise ModelError(f"context: expected at least one key, query and sequence; got {keys}, {queries}, {batch}")
    if positions is None:
        if queries > keys:
            raise ModelError(f"positions: {queries} queries cannot be the last of {keys} keys; give positions [B, Q]")
        positions = torch.arange(keys - queries, keys, device=device)
    position_BQ = positions.to(device).expand(batch, queries)
    low, high = int(position_BQ.min()), int(position_BQ.max())
    if low < 0 or high >= keys:
        raise ModelError(f"positions: expected places in 0..{keys - 1} (the keys given); got {low}..{high}")
    return Rows(position_BQ, keep.of(position_BQ + 1))
