"""Train an indexer to imitate attention: the KL losses of the two stages of DeepSeek sparse attention.

The target is the attention summed over heads and normalised. In the dense stage the indexer's softmax covers the
whole context, in the sparse stage the kept keys only, target renormalised there. The model learns nothing from
these losses: give the indexer detached inputs (``detached`` does it).

Shape letters: B sequences, H query heads, G KV heads, Q queries, N keys, K kept, D width of a head.

Source: DeepSeek-V3.2-Exp report, eq. 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_sim.model.sparse.keep import Rows
from longcat_sim.model.sparse.select import head_scores, probabilities


@torch.no_grad()
def attention_target(q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
    """Return dense attention summed over the heads, normalised to 1 [B, Q, N]."""
    scores = head_scores(q_BHQD, k_BGND, scale).masked_fill(~rows.visible(k_BGND.shape[2])[:, None], -torch.inf)
    return probabilities(scores).mean(1)


def dense_stage_loss(index_scores_BQN: Tensor, target_BQN: Tensor, rows: Rows) -> Tensor:
    """Return the mean KL of target against the indexer's softmax over the visible keys."""
    hidden = ~rows.visible(index_scores_BQN.shape[-1])
    log_index = torch.log_softmax(index_scores_BQN.float().masked_fill(hidden, -torch.inf), dim=-1)
    return _mean_kl(target_BQN, log_index.masked_fill(hidden, 0.0))


def sparse_stage_loss(index_scores_BQN: Tensor, target_BQN: Tensor, indices_BQK: Tensor) -> Tensor:
    """Return the mean KL over the kept keys, both sides renormalised there; -1 pads rows."""
    used = indices_BQK >= 0
    at = indices_BQK.clamp(min=0)
    target = target_BQN.gather(-1, at).masked_fill(~used, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
    scores = index_scores_BQN.float().gather(-1, at).masked_fill(~used, -torch.inf)
    return _mean_kl(target, torch.log_softmax(scores, dim=-1).masked_fill(~used, 0.0))


def detached(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors cut from the model's graph: the indexer's inputs during training."""
    return tuple(tensor.detach() for tensor in tensors)


def _mean_kl(target: Tensor, log_index: Tensor) -> Tensor:
    entropy = torch.special.entr(target).sum(-1)
    return -(entropy + (target * log_index).sum(-1)).mean()
