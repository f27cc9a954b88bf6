"""Which keys a query keeps: the selector interface, the exact selection, and the top-k that all selectors share.

Shape letters: B sequences, H query heads, G KV heads, S sets of kept keys (1, G or H), Q queries, N keys, K kept,
D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse.keep import Rows

Sharing = Literal["head", "group", "all"]
"""Who shares one set: nobody (each query head its own), the query heads of a KV head, or all heads."""


def checked_sharing(sharing: str) -> Sharing:
    """Return ``sharing`` if it is one of the three.

    Raises:
        ModelError: any other word.
    """
    if sharing not in get_args(Sharing):
        raise ModelError(f"sharing: expected one of {', '.join(get_args(Sharing))}; got {sharing!r}")
    return sharing  # type: ignore[return-value]


class Selector(Protocol):
    """Chooses the keys of each query. Nothing flows back through the choice."""

    def select(self, q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
        """Return the kept keys [B, S, Q, K], best first, -1 where a row keeps fewer than K."""
        ...


def head_scores(q_BHQD: Tensor, k_BGND: Tensor, scale: float) -> Tensor:
    """Return scaled products of queries and keys [B, H, Q, N]; query heads of one KV head lie side by side."""
    B, H, Q, D = q_BHQD.shape
    G = k_BGND.shape[1]
    q = (q_BHQD * scale).reshape(B, G, (H // G) * Q, D)
    return (q @ k_BGND.transpose(-1, -2)).view(B, H, Q, -1)


def probabilities(scores: Tensor) -> Tensor:
    """Return the softmax over the last dim, in float32 at least."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def shared_scores(scores_BHQN: Tensor, sharing: Sharing, num_kv_heads: int) -> Tensor:
    """Return scores whose order ranks the keys of each set [B, S, Q, N].

    A set of several heads ranks by the sum of their probabilities.
    Source: DeepSeek-V3.2-Exp report, eq. 3 (the indexer's training target is the head-summed attention).
    """
    if sharing == "head":
        return scores_BHQN
    probs = probabilities(scores_BHQN)
    if sharing == "all":
        return probs.sum(1, keepdim=True)
    B, H, Q, N = probs.shape
    return probs.view(B, num_kv_heads, H // num_kv_heads, Q, N).sum(2)


def topk_indices(scores_BSQN: Tensor, rows: Rows, where: str = "scores") -> Tensor:
    """Return each row's best visible keys [B, S, Q, K], best first, padded with -1.

    Raises:
        ModelError: a score is NaN.
    """
    if bool(torch.isnan(scores_BSQN).any()):
        raise ModelError(
            f"{where}: expected numbers; got NaN; look for overflow or NaN in the queries, keys or weights"
        )
    keys = scores_BSQN.shape[-1]
    if int(rows.position_BQ.min()) + 1 < keys:
        scores_BSQN = scores_BSQN.masked_fill(~rows.visible(keys)[:, None], -torch.inf)
    most = rows.most_kept
    best = scores_BSQN.topk(most, dim=-1).indices
    rank = torch.arange(most, device=best.device)
    unused = (rank >= rows.kept_BQ[:, None, :, None]) | (best > rows.position_BQ[:, None, :, None])
    return best.masked_fill(unused, -1) if bool(unused.any()) else best


@dataclass(frozen=True)
class ExactSelector:
    """The exact top-k: every key is scored with the attention's own queries."""

    sharing: Sharing = "head"

    def __post_init__(self) -> None:
        checked_sharing(self.sharing)

    def select(self, q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
        """Return the kept keys [B, S, Q, K]."""
        scores = head_scores(q_BHQD, k_BGND, scale)
        if self.sharing != "head":
            keys = k_BGND.shape[2]
            if int(rows.position_BQ.min()) + 1 < keys:  # a softmax must not see the future
                scores = scores.masked_fill(~rows.visible(keys)[:, None], -torch.inf)
            scores = shared_scores(scores, self.sharing, k_BGND.shape[1])
        return topk_indices(scores, rows)
