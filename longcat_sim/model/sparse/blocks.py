"""Block-summary selection: rank pages of keys by a bound or a mean, then keep the tokens of the best pages.

``bounds`` scores a page by the largest product any key inside its per-dimension limits could have (Quest), ``means``
by the product with its mean key (MoBA). A page that a query sees only in part is always kept: its summary would tell
of the future. Ties within a page are cut anywhere, so a whole number of pages wants a multiple of the page.

Shape letters: B sequences, H query heads, G KV heads, S sets, Q queries, N keys, M pages, K kept, D width of a head.

Source: Quest, arXiv 2406.10774 (page bounds); MoBA, arXiv 2502.13189 (block means).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse.keep import Rows
from longcat_sim.model.sparse.select import Sharing, checked_sharing, head_scores, shared_scores, topk_indices

Rule = Literal["bounds", "means"]


class PageSummary(NamedTuple):
    """Limits and means of the keys of each page [B, G, M, D]."""

    low: Tensor
    high: Tensor
    mean: Tensor
    page_tokens: int


def summarise(k_BGND: Tensor, page_tokens: int) -> PageSummary:
    """Return the summary of each page of keys; the last page may be short."""
    if page_tokens < 1:
        raise ModelError(f"page_tokens: expected a whole number >= 1, such as 16; got {page_tokens}")
    keys = k_BGND.shape[2]
    pages = [k_BGND[:, :, : keys // page_tokens * page_tokens].unflatten(2, (-1, page_tokens))]
    if keys % page_tokens:
        pages.append(k_BGND[:, :, None, keys // page_tokens * page_tokens :])
    pages = [page for page in pages if page.numel()]
    return PageSummary(
        torch.cat([page.amin(3) for page in pages], 2),
        torch.cat([page.amax(3) for page in pages], 2),
        torch.cat([page.mean(3) for page in pages], 2),
        page_tokens,
    )


class BlockSelector:
    """The choice by page summaries."""

    def __init__(self, rule: Rule = "bounds", page_tokens: int = 16, sharing: Sharing = "head") -> None:
        if rule not in ("bounds", "means"):
            raise ModelError(f"rule: expected bounds or means; got {rule!r}")
        if page_tokens < 1:
            raise ModelError(f"page_tokens: expected a whole number >= 1, such as 16; got {page_tokens}")
        self.rule, self.page_tokens, self.sharing = rule, page_tokens, checked_sharing(sharing)

    def page_scores(self, q_BHQD: Tensor, summary: PageSummary, scale: float) -> Tensor:
        """Return the score of each page for each query head [B, H, Q, M]."""
        if self.rule == "means":
            return head_scores(q_BHQD, summary.mean, scale)
        # sum over dims of max(q low, q high): the positive part of q meets the upper limit, the negative the lower
        return head_scores(q_BHQD.clamp(min=0), summary.high, scale) + head_scores(
            q_BHQD.clamp(max=0), summary.low, scale
        )

    def select(self, q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
        """Return the kept keys [B, S, Q, K]."""
        keys = k_BGND.shape[2]
        summary = summarise(k_BGND, self.page_tokens)
        pages = summary.mean.shape[2]
        page_ends = torch.arange(1, pages + 1, device=k_BGND.device) * self.page_tokens
        whole = (page_ends <= rows.position_BQ[..., None] + 1)[:, None]  # [B, 1, Q, M]
        scores = self.page_scores(q_BHQD, summary, scale)
        scores = scores.masked_fill(~whole, torch.finfo(scores.dtype).min)
        shared = shared_scores(scores, self.sharing, k_BGND.shape[1]).masked_fill(~whole, torch.inf)
        return topk_indices(shared.repeat_interleave(self.page_tokens, -1)[..., :keys], rows, "page scores")
