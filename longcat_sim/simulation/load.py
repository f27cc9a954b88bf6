"""Random expert load: how many token copies each rank sends and its experts get, layer by layer, draw by draw.

With zero-computation experts the number of FFN experts of a token is random, so what a rank *sends* is random too.
Arrays are [layers, draws, ranks].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from longcat_sim.errors import SpecError
from longcat_sim.ops.graph import LayerLoad
from longcat_sim.ops.op import FloatArray
from longcat_sim.order_statistics import largest_quantile
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.specs.deployment import Deployment, Routing
from longcat_sim.specs.model import ModelSpec

ZERO_EXPERT_STD = 3.0
"""Standard deviation over tokens of the FFN experts of a token (of 12 choices, mean 8).

Source: LongCat-Flash report, Fig. 3c, as read in third-party notes ("about 3")."""


@dataclass(frozen=True)
class Popularity:
    """What routing is like: FFN experts per token, and each expert's share of the copies [layers or 1, experts]."""

    mean: float
    std: float
    share: FloatArray

    def of_layer(self, layer: int) -> FloatArray:
        """Return the shares in one layer [experts]."""
        return self.share[layer % len(self.share)]


def popularity(
    model: ModelSpec, routing: Routing, *, layers: int, seed: int = 0, trace: RoutingTrace | None = None
) -> Popularity:  # fmt: skip
    """Return what ``routing`` says of this model.

    ``trace`` is a ``RoutingTrace``, for ``recorded``. One of another size is resampled at this model's N, Z and K: each
    expert gets the popularity of a recorded one, and the FFN share of a token's choices is kept.

    Raises:
        SpecError: ``recorded`` without a trace.
    """
    experts, rng = model.n_routed_experts, np.random.default_rng((seed, 1))
    mean = model.expected_ffn_experts if routing.ffn_experts_mean is None else routing.ffn_experts_mean
    std = ZERO_EXPERT_STD if model.zero_expert_num else 0.0
    std = std if routing.ffn_experts_std is None else routing.ffn_experts_std
    if routing.source == "power_law":
        rank = np.arange(1, experts + 1, dtype=float) ** -routing.exponent
        share = np.stack([rng.permutation(rank) for _ in range(layers)])
    elif routing.source == "recorded":
        if trace is None:
            raise SpecError("routing.file: expected a recorded RoutingTrace, such as routing.npz; got none")
        recorded = trace.tokens_per_expert()[:, : trace.n_routed_experts].astype(float)
        share = recorded if recorded.shape[1] == experts else rng.choice(recorded, size=experts, axis=1)
        share = np.maximum(share, 1e-12)
        chosen = trace.ffn_experts() * (model.moe_topk / trace.moe_topk)
        mean = float(chosen.mean()) if routing.ffn_experts_mean is None else mean
        std = float(chosen.std()) if routing.ffn_experts_std is None else std
    else:
        share = np.ones((1, experts))
    return Popularity(mean, std, share / share.sum(axis=1, keepdims=True))


def placement(share: FloatArray, ranks: int, routing: Routing) -> tuple[FloatArray, Any]:
    """Return (share of each slot, its rank) for one layer: experts in order, or replicated and packed by EPLB.

    EPLB gives each redundant slot to the expert with the most copies per replica, then packs slots on ranks, heaviest
    first, onto the lightest rank with room. Its cost is memory for the extra slots, which ``memory`` counts.

    Source: deepseek-ai/EPLB README (replicate_experts, balanced_packing).
    """
    experts = len(share)
    if routing.placement == "static":
        return share, np.arange(experts) * ranks // experts
    extra = routing.redundant_experts or 0
    slots = experts + extra
    if slots % ranks:
        raise SpecError(
            f"routing.redundant_experts: experts and copies must divide over the ranks: ({experts} + {extra}) % "
            f"{ranks} = {slots % ranks}; try {-experts % ranks or ranks}"
        )
    replicas = np.ones(experts)
    for _ in range(extra):
        replicas[np.argmax(share / replicas)] += 1
    slot_share = np.repeat(share / replicas, replicas.astype(int))
    order = np.argsort(-slot_share)
    room, weight = np.full(ranks, slots // ranks), np.zeros(ranks)
    where = np.empty(slots, dtype=int)
    for slot in order:
        rank = int(np.argmin(np.where(room > 0, weight, np.inf)))
        where[slot] = rank
        room[rank] -= 1
        weight[rank] += slot_share[slot]
    return slot_share, where


def distinct_nodes(model: ModelSpec, ranks: int, domain: int, copies: float) -> float:
    """Return the expected number of nodes among a token's ``copies`` experts (its own counted), for the normal mode.

    Group-limited routing (DeepSeek's ``topk_group`` of ``n_group`` groups of experts) bounds it.

    Source: DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2 (node-limited routing).
    """
    nodes = max(1.0, ranks / domain)
    if nodes <= 1:
        nodes_of_token = min(ranks, ranks * (1 - (1 - 1 / ranks) ** copies)) if ranks > 1 else 1.0
        return nodes_of_token  # inside a domain a token travels once to each rank
    if model.n_group > 1 and model.topk_group < model.n_group:
        groups, chosen = model.n_group, model.topk_group
        per_node = groups / nodes  # groups whose experts one node holds
        if per_node >= 1:
            held = per_node  # chance that none of a node's groups is chosen
            miss = 1.0
            for i in range(chosen):
                miss *= max(0.0, (groups - held - i) / (groups - i))
            return nodes * (1 - miss)
        spread = nodes / groups  # nodes of one group
        return chosen * spread * (1 - (1 - 1 / spread) ** (copies / chosen))
    return nodes * (1 - (1 - 1 / nodes) ** copies)


def draw_loads(
    model: ModelSpec, deployment: Deployment, routing: Routing, tokens_per_rank: float, *, layers: int, draws: int = 1,
    seed: int = 0, domain: int = 8, trace: RoutingTrace | None = None,
) -> LayerLoad:  # fmt: skip
    """Return the loads of ``draws`` steps: sent, received, active experts and fan-out [layers, draws, ranks].

    ``balanced`` gives every rank the mean in every draw. Otherwise the copies a rank sends are the sum over its tokens
    of a random number of FFN experts (normal, cut to 0..top-k per token), and go to experts by a multinomial draw.
    """
    ranks = deployment.ep_size
    experts = model.n_routed_experts
    known = popularity(model, routing, layers=layers, seed=seed, trace=trace)
    tokens = float(tokens_per_rank)
    spread = distinct_nodes(model, ranks, domain, known.mean)
    mean = tokens * known.mean
    if routing.source == "balanced":
        # every expert of a rank is hit once there are as many copies as experts
        hit = min(experts / ranks, mean)
        full = np.ones((1, 1, 1))
        return LayerLoad(mean * full, mean * full, hit * full, tokens * spread * full)
    rng = np.random.default_rng((seed, 2))
    shape = (layers, draws, ranks)
    sent: FloatArray = np.full(shape, mean)
    if known.std > 0:
        noise = rng.standard_normal(shape) * known.std * np.sqrt(tokens)
        sent = np.clip(mean + noise, 0.0, tokens * model.moe_topk)
    sent = np.round(sent)
    totals = sent.sum(axis=2).astype(np.int64)
    received = np.empty(shape)
    active = np.empty(shape)
    slots = None
    for layer in range(layers):
        if slots is None or len(known.share) > 1:
            slots = placement(known.of_layer(layer), ranks, routing)
        share, where = slots
        counts = rng.multinomial(totals[layer], share / share.sum())
        order = np.argsort(where, kind="stable")
        edges = np.searchsorted(where[order], np.arange(ranks))
        received[layer] = np.add.reduceat(counts[:, order], edges, axis=1)
        active[layer] = np.add.reduceat(counts[:, order] > 0, edges, axis=1)
    return LayerLoad(sent, received, active, sent / known.mean * spread)


def draw_contexts(
    mean: float, spread: float, sequences: float, *, ranks: int, tp_size: int = 1, draws: int = 1, seed: int = 0
) -> FloatArray:
    """Return each rank's mean context [1, draws, ranks]; ranks of one tensor-parallel group share their sequences.

    Contexts are gamma distributed with coefficient of variation ``spread``; so is the mean of ``sequences`` of them.
    """
    shape = sequences / spread**2
    rng = np.random.default_rng((seed, 4))
    own = rng.gamma(shape, mean / shape, (1, draws, -(-ranks // tp_size)))
    return np.repeat(own, tp_size, axis=2)[:, :, :ranks]


def busiest_context(spread: float, sequences: FloatArray, ranks: int) -> FloatArray:
    """Return the expected mean context of the rank with the longest ones, over the mean [points, 1]."""
    from scipy.special import gammaincinv  # of the gamma distribution that sums of contexts follow

    sequences = np.asarray(sequences, dtype=float)
    holding = np.clip(sequences * ranks, 1.0, ranks)  # below one sequence a rank, some have none
    shape = np.maximum(sequences, 1.0) / spread**2
    longest = gammaincinv(shape, largest_quantile(holding)) / shape
    return np.asarray(np.where(holding > 1, np.maximum(longest, 1.0), 1.0))


def typical_load(
    model: ModelSpec, deployment: Deployment, routing: Routing, tokens_per_rank: FloatArray, *, seed: int = 0,
    domain: int = 8, samples: int = 64, trace: RoutingTrace | None = None,
) -> LayerLoad:  # fmt: skip
    """Return the load of the rank that decides, for many step sizes at once [points, 1].

    The mean over random draws of the *busiest* rank's copies, as a share above the mean that falls with the square root
    of the tokens; for what one rank stands for all (grids). ``balanced`` gives the mean.
    """
    tokens = np.asarray(tokens_per_rank, dtype=float).reshape(-1, 1)
    known = popularity(model, routing, layers=8, seed=seed, trace=trace)
    spread = distinct_nodes(model, deployment.ep_size, domain, known.mean)
    mean = tokens * known.mean
    per_rank = model.n_routed_experts / deployment.ep_size
    if routing.source == "balanced":
        return LayerLoad(mean, mean, np.minimum(per_rank, mean), tokens * spread)
    first, last = np.floor(np.log2(max(tokens.min(), 0.25))), np.ceil(np.log2(max(tokens.max(), 1.0)))
    anchors = 2.0 ** np.arange(first, max(last, first + 1) + 1)
    ranks = Deployment(num_gpus=deployment.ep_size, ep_size=deployment.ep_size)
    busiest = _busiest.__wrapped__ if trace is not None else _busiest
    sent, received, active = zip(
        *(busiest(model, ranks, routing, float(anchor), samples, seed, trace) for anchor in anchors), strict=True
    )
    at = np.log(tokens)
    grid = np.log(anchors)
    return LayerLoad(
        mean * np.interp(at, grid, sent), mean * np.interp(at, grid, received), np.interp(at, grid, active),
        tokens * spread * np.interp(at, grid, sent),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _busiest(
    model: ModelSpec, deployment: Deployment, routing: Routing, tokens: float, samples: int, seed: int, trace: Any
) -> tuple[float, float, float]:
    """Return the busiest rank's sent and received copies over the mean, and its active experts; the same for every
    device and schedule, so it is kept."""
    load = draw_loads(model, deployment, routing, tokens, layers=8, draws=samples // 8, seed=seed, trace=trace)
    mean = tokens * popularity(model, routing, layers=8, seed=seed, trace=trace).mean
    return (
        float(load.sent.max(axis=2).mean() / mean), float(load.received.max(axis=2).mean() / mean),
        float(load.active.max(axis=2).mean()),
    )  # fmt: skip
