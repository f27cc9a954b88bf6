"""The budget controller: each router's bias moves until every FFN expert gets its share of the choices.

    db_i = mu * (K_e / (K N) - T_i / (K T_all))    FFN experts;  0 for zero-computation experts

Error accumulated into b: integral action. Source: LongCat-Flash Technical Report, arXiv 2509.01322v2, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longcat_sim.specs.model import ModelSpec


class BudgetController:
    """Updates the biases of a model's routers from the choices of a whole batch."""

    def __init__(self, spec: ModelSpec) -> None:
        self.ffn, self.topk = spec.n_routed_experts, spec.moe_topk
        self.set_point = spec.expected_ffn_experts / (spec.moe_topk * spec.n_routed_experts)
        """Share of all choices that one FFN expert is to get: K_e / (K N)."""

    @torch.no_grad()
    def update(self, biases: Sequence[Tensor], experts: Sequence[Tensor], rate: float) -> None:
        """Move each layer's bias [E] by ``rate`` times its error; ``experts`` [T, K] are the choices of the batch."""
        for bias_E, chosen_TK in zip(biases, experts, strict=True):
            counts_E = torch.bincount(chosen_TK.flatten(), minlength=bias_E.numel())[: self.ffn]
            share_E = counts_E.to(bias_E.dtype) / chosen_TK.numel()
            bias_E[: self.ffn] += rate * (self.set_point - share_E)

    def ffn_experts(self, chosen_TK: Tensor) -> Tensor:
        """Return the number of FFN experts of each token [T]."""
        return (chosen_TK < self.ffn).sum(-1)
