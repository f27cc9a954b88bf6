"""How many distinct experts the tokens of one step reach on the busiest expert-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from longcat_sim.order_statistics import largest_quantile

POPULARITY_SIGMA = 0.7
"""Spread of the experts' popularity, as sigma of a lognormal. With it the distinct experts of Qwen3-30B-A3B reach 0.865
of what uniform choices reach in mid-range, and 0.92..0.98 of it at 64..128 tokens; counted were 0.87 and 0.94 there.
Source: LLMServingSim documentation, MoE expert routing, 110,640 gate calls (counts, no times)."""
QUANTILES = 512


@lru_cache(maxsize=16)
def _chosen(num_experts: int, topk: int) -> np.ndarray:
    """Return the probability that one token chooses an expert, over quantiles of popularity; its mean is k / E."""
    normal = NormalDist()
    z = np.array([normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)])
    share = topk / num_experts
    chosen = np.exp(POPULARITY_SIGMA * z)
    for _ in range(50):  # a probability is 1 at most; what that takes from the popular ones goes to the others
        chosen = np.minimum(chosen * (share / chosen.mean()), 1.0)
    chosen.setflags(write=False)  # it is kept
    return chosen


@dataclass(frozen=True)
class ActiveExperts:
    """Distinct experts by tokens: mean over ranks, and on the busiest of them."""

    num_experts: int
    topk: int
    ranks: int = 1

    def mean(self, tokens: float) -> float:
        """Return the distinct experts of one rank, on average."""
        reached = 1 - (1 - _chosen(self.num_experts, self.topk)) ** tokens
        return float(reached.mean()) * self.num_experts / self.ranks

    def busiest(self, tokens: float) -> float:
        """Return the distinct experts of the rank that has most of them, for which the others wait.

        Whether an expert is reached is one draw per expert: popular ones lie on ranks by chance, and so do the choices
        of a step. Counts of ranks are nearly normal.
        """
        mean = self.mean(tokens)
        if self.ranks < 2:
            return mean
        per_rank = self.num_experts / self.ranks
        spread = (mean * (1 - mean / per_rank)) ** 0.5
        quantile = NormalDist().inv_cdf(largest_quantile(self.ranks))
        return float(min(mean + quantile * spread, per_rank, self.topk * max(tokens, 1.0)))
