"""How close sparse attention comes to dense: precision, mass kept, output error, entropy; KL and top-1 of logits.

Precision alone misleads: one set for all heads loses half of it and hardly any quality, random misses at the same
precision are ruinous. Read it beside the mass kept.

Shape letters: B sequences, H query heads, G KV heads, S sets of kept keys (1, G or H), Q queries, N keys, K kept,
D width of queries and keys, V width of values, T tokens, W vocabulary.

Source: arXiv 2512.03494 (retrieval precision, entropy); the bound is derived here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse.attention import kept_mask
from longcat_sim.model.sparse.keep import Rows
from longcat_sim.model.sparse.select import head_scores, probabilities, topk_indices


class Fidelity(NamedTuple):
    """Figures of each head and query [B, H, Q]."""

    precision: Tensor
    """Share of the kept keys that the head's own exact top-k keeps too."""
    mass: Tensor
    """Dense probability of the kept keys."""
    output_error: Tensor
    """Length of the output's difference over the length of the dense output."""
    entropy: Tensor
    """Entropy of the dense attention, in nats."""
    kept: Tensor
    """Keys kept."""

    @property
    def dropped(self) -> Tensor:
        """Dense probability of the keys left out."""
        return 1.0 - self.mass

    @property
    def dropped_bound(self) -> Tensor:
        """Most that the exact top-K of an attention of this entropy can drop."""
        return dropped_mass_bound(self.entropy, self.kept)

    def by_head(self) -> dict[str, Tensor]:
        """Return each figure's mean by head [H]."""
        return {name: getattr(self, name).float().mean((0, 2)) for name in self._fields}


def attention_fidelity(
    q_BHQD: Tensor, k_BGND: Tensor, v_BGNV: Tensor, indices_BSQK: Tensor, rows: Rows, scale: float
) -> Fidelity:
    """Return how close attention over the kept keys comes to dense attention of the same queries and keys.

    Holds the scores of all heads, queries and keys of the call: give it few queries at a time.
    """
    H, G, N = q_BHQD.shape[1], k_BGND.shape[1], k_BGND.shape[2]
    scores = head_scores(q_BHQD, k_BGND, scale)
    scores = scores.masked_fill(~rows.visible(N)[:, None], -torch.inf)
    probs = probabilities(scores)
    mask = _to_heads(kept_mask(indices_BSQK, N), H)
    exact = kept_mask(topk_indices(scores, rows), N)
    kept = mask.sum(-1)
    mass = (probs * mask).sum(-1)
    dense = _times_values(probs, v_BGNV, G)
    sparse = _times_values(probabilities(scores.masked_fill(~mask, -torch.inf)), v_BGNV, G)
    return Fidelity(
        precision=(mask & exact).sum(-1) / kept,
        mass=mass,
        output_error=(sparse - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-30),
        entropy=entropy(probs),
        kept=kept,
    )


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy of the last dim, in nats."""
    return torch.special.entr(probs).sum(-1)


def dropped_mass_bound(entropy_nats: Tensor, kept: Tensor) -> Tensor:
    """Return the largest mass outside the K likeliest entries of a distribution with this entropy: H / ln(K + 1).

    Every entry outside is at most 1 / (K + 1), so each carries at least its share times ln(K + 1) of entropy.
    """
    return entropy_nats / torch.log(kept.to(entropy_nats.dtype) + 1.0)


def retrieval_precision(indices_BSQK: Tensor, exact_BSQK: Tensor, num_heads: int, keys: int) -> Tensor:
    """Return the share of kept keys that the other choice keeps too, by head and query [B, H, Q].

    Sets shared by several heads are compared with each head's own.
    """
    sets = max(indices_BSQK.shape[1], exact_BSQK.shape[1])
    if num_heads % sets:
        raise ModelError(f"num_heads: expected a multiple of the {sets} sets; got {num_heads}")
    mask = _to_heads(kept_mask(indices_BSQK, keys), num_heads)
    exact = _to_heads(kept_mask(exact_BSQK, keys), num_heads)
    return (mask & exact).sum(-1) / mask.sum(-1).clamp_min(1)


class LogitFidelity(NamedTuple):
    """Figures of each token [T]."""

    kl: Tensor
    """KL of the dense prediction against the sparse one, in nats."""
    top1_same: Tensor
    """Whether the likeliest token is the same."""


def logit_fidelity(sparse_TW: Tensor, dense_TW: Tensor) -> LogitFidelity:
    """Return how close predictions come to the dense ones."""
    if sparse_TW.shape != dense_TW.shape:
        raise ModelError(f"logits: expected one shape; got {list(sparse_TW.shape)} and {list(dense_TW.shape)}")
    log_sparse, log_dense = torch.log_softmax(sparse_TW.float(), -1), torch.log_softmax(dense_TW.float(), -1)
    return LogitFidelity(
        (log_dense.exp() * (log_dense - log_sparse)).sum(-1), sparse_TW.argmax(-1) == dense_TW.argmax(-1)
    )


def renormalisation_kl(dropped: float) -> float:
    """Return the KL of renormalised kept probabilities against the dense ones: -ln(1 - dropped)."""
    return -math.log1p(-dropped)


def _to_heads(mask_BSQN: Tensor, heads: int) -> Tensor:
    return mask_BSQN.repeat_interleave(heads // mask_BSQN.shape[1], dim=1)


def _times_values(probs_BHQN: Tensor, v_BGNV: Tensor, groups: int) -> Tensor:
    B, H, Q, N = probs_BHQN.shape
    return (probs_BHQN.view(B, groups, H // groups * Q, N) @ v_BGNV.to(probs_BHQN.dtype)).view(B, H, Q, -1)
