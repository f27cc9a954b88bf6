"""Losses beside the next token's: device-level balance, hidden z-loss, MTP; and the router's gradient ratio.

Source: LongCat-Flash Technical Report, arXiv 2509.01322v2: Eq. 3-5 (balance), section 3.1.3 (R_g, z-loss).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.moe import Routing
from longcat_sim.specs.model import ModelSpec


def group_of_expert(spec: ModelSpec, groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Return each expert's group: 0..D-1 for FFN experts in order, D for all zero-computation experts [E]."""
    ffn = torch.arange(spec.n_routed_experts, device=device) // (spec.n_routed_experts // groups)
    return torch.cat([ffn, torch.full((spec.zero_expert_num,), groups, device=device)])


def group_loads(chosen_TK: Tensor, spec: ModelSpec, groups: int) -> Tensor:
    """Return f_j: each group's share of the choices over its share at balance [D + 1], all 1 at balance.

    The indicator of Eq. 5 counts choices (a token that picks two experts of a group counts twice): only then are
    all f_j one where FFN and zero-computation experts stand K_e : K - K_e.
    """
    group_E = group_of_expert(spec, groups, chosen_TK.device)
    counts = torch.bincount(group_E[chosen_TK.flatten()], minlength=groups + 1).float()
    tokens, expected = chosen_TK.shape[0], spec.expected_ffn_experts
    at_balance = torch.full((groups + 1,), expected * tokens / groups, device=chosen_TK.device)
    at_balance[groups] = max((spec.moe_topk - expected) * tokens, 1e-9)
    loads = counts / at_balance
    return loads if spec.zero_expert_num else torch.cat([loads[:groups], loads.new_zeros(1)])


def balance_loss(routing: Routing, spec: ModelSpec, groups: int) -> Tensor:
    """Return sum_j f_j P_j of one layer (Eq. 3, alpha not yet multiplied)."""
    assert routing.scores_TE is not None
    loads = group_loads(routing.experts_TK, spec, groups)
    group_E = group_of_expert(spec, groups, loads.device)
    return (routing.scores_TE.mean(0) * loads[group_E]).sum()


def hidden_z_loss(hidden_TH: Tensor) -> Tensor:
    """Return mean_t (log sum_i exp|z_i|)^2 of the last layer's output before the final norm."""
    return hidden_TH.float().abs().logsumexp(-1).square().mean()


def mtp_logits(model: LongcatFlash, tokens_BS: Tensor, hidden_BSH: Tensor) -> Tensor:
    """Return the head's logits for the token after the next, at all positions but the last [B, S-1, vocab]."""
    assert model.mtp is not None
    B, S = tokens_BS.shape
    embedded = model.embedding(tokens_BS[:, 1:]).flatten(0, 1)
    hidden = model.mtp(embedded, hidden_BSH[:, :-1].flatten(0, 1), model.step(B, S - 1))
    return model.head(hidden).view(B, S - 1, -1)


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())


def router_gradient_ratio(
    lm_loss: Tensor, routings: Sequence[Routing], spec: ModelSpec, groups: int, alpha: float
) -> list[float]:
    """Return R_g of each layer: |alpha grad_P L_LB| / |grad_P L_LM|, P the batch mean of the router's probabilities.

    With R_t = P + (R_t - P), a gradient with respect to P is the sum over tokens of that with respect to R_t; the
    balance loss's is alpha f. Keeps the graph.
    """
    scores = [routing.scores_TE for routing in routings]
    assert all(score is not None for score in scores)
    gradients = torch.autograd.grad(lm_loss, scores, retain_graph=True)  # type: ignore[arg-type]
    ratios = []
    for routing, gradient_TE in zip(routings, gradients, strict=True):
        loads = group_loads(routing.experts_TK, spec, groups)
        balance_E = alpha * loads[group_of_expert(spec, groups, loads.device)]
        ratios.append(float(balance_E.norm() / gradient_TE.sum(0).norm().clamp_min(1e-30)))
    return ratios


@torch.no_grad()
def router_similarity(weight_EH: Tensor) -> float:
    """Return the mean pairwise cosine similarity of the expert vectors of one router."""
    unit = F.normalize(weight_EH.float(), dim=-1)
    count = unit.shape[0]
    total = unit.sum(0).square().sum() - count
    return float(total / (count * (count - 1)))
