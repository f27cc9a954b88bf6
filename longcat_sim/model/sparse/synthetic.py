"""A selector with a precision set by hand: the exact set with some members replaced by other visible tokens.

Which members are missed decides the outcome, so it is a choice: ``random`` ones, or the ``lowest``-scored. What
fills the gap is random. Precision is the share of the kept that belongs to the exact set.

Source: arXiv 2512.03494 varies the retrieval precision in this way; the text seen does not say which are missed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse.keep import Rows
from longcat_sim.model.sparse.select import ExactSelector, Sharing

Miss = Literal["random", "lowest"]


class SyntheticSelector:
    """Exact selection, spoilt to a precision. Draws follow call order from the seed: build it anew to repeat."""

    def __init__(
        self,
        precision: float,
        miss: Miss = "random",
        *,
        sharing: Sharing = "head",
        always_keep: int = 0,
        seed: int = 0,
    ) -> None:
        """Set the rule; the ``always_keep`` best tokens of a row are never missed while others can be."""
        if not 0 <= precision <= 1:
            raise ModelError(f"precision: expected a number in [0, 1], such as 0.6; got {precision}")
        if miss not in ("random", "lowest"):
            raise ModelError(f"miss: expected random or lowest; got {miss!r}")
        if always_keep < 0:
            raise ModelError(f"always_keep: expected a whole number >= 0; got {always_keep}")
        self.precision, self.miss, self.always_keep = precision, miss, always_keep
        self.exact = ExactSelector(sharing)
        self._seed = seed
        self._generator: torch.Generator | None = None

    def _uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(shape, generator=self._generator, device=like.device)

    def select(self, q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
        """Return the kept keys [B, S, Q, K]; a row with too few other tokens to fill all gaps keeps fewer."""
        exact = self.exact.select(q_BHQD, k_BGND, rows, scale)
        B, S, Q, K = exact.shape
        keys = k_BGND.shape[2]
        kept = rows.kept_BQ[:, None, :, None]
        hits = (kept * self.precision + 0.5).floor().long()
        rank = torch.arange(K, device=exact.device)
        if self.miss == "random":
            order = self._uniform((B, S, Q, K), exact).masked_fill(rank < self.always_keep, 2.0)
            exact = exact.gather(-1, order.masked_fill(exact < 0, -1.0).argsort(-1, descending=True))
        filler = self._uniform((B, S, Q, keys), exact)
        taken = torch.zeros(B, S, Q, keys + 1, dtype=torch.bool, device=exact.device)
        taken.scatter_(-1, exact.where(exact >= 0, keys), True)
        filler.masked_fill_(taken[..., :keys] | ~rows.visible(keys)[:, None], -1.0)
        value, other = filler.topk(min(K, keys), dim=-1)
        other = other.masked_fill(value < 0, -1)
        # ranks below hits come from the exact set, the rest up to kept from the fillers
        at = (rank - hits).clamp(min=0).expand(B, S, Q, K)
        return torch.where(rank < hits, exact, other.gather(-1, at)).masked_fill(rank >= kept, -1)
