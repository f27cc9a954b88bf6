"""Step times of a vLLM v1 engine from a layer profile, the model's shape and the engine's settings.

A step is the sum of its kernels (the profile), with these terms, none of them fitted:

* CUDA-graph padding: a step of at most ``max_capture`` tokens runs the captured graph of the next size, so dense
  kernels see that many rows (vLLM ``VllmConfig._set_cudagraph_sizes``: 1, 2, 4, 8 to 256 by 8, then by 16, up to
  min(2 x max_num_seqs, 512)).
* Logits and sampling for each scheduled sequence only.
* Unequal contexts in attention: the measured share between the time of the mean and of the longest.
* Tensor parallelism: a ring all-reduce after o_proj, the FFN and the embedding, an all-gather of the logits.
* Expert parallelism: all-gather of tokens before, reduce-scatter after the experts (vLLM's default
  ``allgather_reducescatter`` backend), every rank waiting for the slowest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from longcat_sim.calibration.layer_profile import LayerProfile, interpolate
from longcat_sim.specs.model import ModelSpec

Shape = tuple[Sequence[int], Sequence[tuple[int, int]]]
"""(decode contexts, prefill chunks of (tokens, tokens before))"""

BEFORE_LAYERS = ("embedding",)
AFTER_LAYERS = ("final_layernorm",)
DENSE_FFN = ("gate_up_proj", "act_fn", "down_proj")
GATE_COVERAGE = (1.0, 0.87, 0.94)
"""Distinct experts of a trained gate over those of a uniform one: at one token, mid-range, saturated.
Source: LLMServingSim documentation, MoE expert routing, 110,640 gate calls of Qwen3-30B-A3B (counts, not times)."""
LAYER_COUNTS = {"layernorm": 2}
"""Input and post-attention norm share one curve; every other kernel of the dense table runs once per layer."""


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return the token counts for which CUDA graphs are captured.

    Source: vLLM ``VllmConfig._set_cudagraph_sizes``.
    """
    most = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return [size for size in sizes if size <= most]


@dataclass(frozen=True)
class Collective:
    """A link between the ranks of one collective: ring algorithms, one latency per hop."""

    bytes_per_s: float
    latency_s: float

    def ring_us(self, bytes_per_hop: float, hops: int) -> float:
        """Return the time of ``hops`` rounds that each send ``bytes_per_hop`` to the neighbour."""
        return hops * (self.latency_s + bytes_per_hop / self.bytes_per_s) * 1e6 if hops else 0.0

    def all_reduce_us(self, message_bytes: float, ranks: int) -> float:
        """Return a ring all-reduce. Source: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009)."""
        return self.ring_us(message_bytes / ranks, 2 * (ranks - 1))

    def all_gather_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return a ring all-gather of equal parts."""
        return self.ring_us(bytes_per_rank, ranks - 1)


@dataclass
class EngineTimes:
    """Times that depend on every sequence of a step (``DetailedStepTimes``); of DP ranks in lockstep too."""

    profile: LayerProfile
    model: ModelSpec
    max_num_seqs: int
    tp_size: int = 1
    dp_size: int = 1
    is_expert_parallel: bool = False
    link: Collective | None = None
    is_eager: bool = False
    is_detailed: bool = True

    def __post_init__(self) -> None:
        self.sizes = [] if self.is_eager else capture_sizes(self.max_num_seqs)
        self._dense: dict[int, tuple[float, float]] = {}
        moe_layers = self.model.num_moe_layers
        self.num_moe = moe_layers if self.profile.moe else 0
        self.num_dense = self.model.num_layers - self.num_moe

    def rows(self, tokens: int) -> int:
        """Return the rows of the forward pass: the captured size, or the tokens themselves."""
        if self.sizes and tokens <= self.sizes[-1]:
            return self.sizes[bisect_left(self.sizes, tokens)]
        return tokens

    def _kernels(self, rows: int) -> tuple[float, float]:
        """Return (dense kernels of all layers, those outside the layers) in microseconds."""
        cached = self._dense.get(rows)
        if cached is None:
            inside = outside = 0.0
            for name, curve in self.profile.dense.items():
                time = interpolate(curve, rows)
                if name in BEFORE_LAYERS or name in AFTER_LAYERS:
                    outside += time
                elif name in DENSE_FFN:
                    inside += time * self.num_dense
                else:
                    inside += time * LAYER_COUNTS.get(name, 1) * self.model.num_layers
            cached = self._dense[rows] = inside, outside
        return cached

    def _rank_us(self, shape: Shape, rows: int) -> tuple[float, float]:
        """Return (time of one rank without experts and collectives, sequences that are sampled)."""
        contexts, chunks = shape
        inside, outside = self._kernels(rows)
        # a chunk of one token is a decode to the kernel
        decodes = [*contexts, *(past + 1 for q, past in chunks if q == 1)]
        prefills = [(q, past) for q, past in chunks if q > 1]
        attention = self.profile.attention_us(decodes, prefills) * self.model.num_layers
        sequences = len(contexts) + len(chunks)
        head = sum(interpolate(curve, sequences) for curve in self.profile.per_sequence.values()) if sequences else 0.0
        return inside + outside + attention + head, sequences

    def step_ns(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> int:
        """Return the time of one step of a single data-parallel rank."""
        return self.group_step_ns([(contexts, chunks)])

    def group_step_ns(self, shapes: Sequence[Shape]) -> int:
        """Return the time of one step of all data-parallel ranks, which wait for one another at every expert layer.

        A rank without work runs one token. Ranks that replay graphs all take the largest captured size.
        """
        tokens = [max(1, len(c) + sum(q for q, _ in chunks)) for c, chunks in shapes]
        rows = [self.rows(t) for t in tokens]
        if len(rows) > 1 and self.sizes and max(tokens) <= self.sizes[-1]:
            rows = [max(rows)] * len(rows)
        parts = [
            self._rank_us(shape if shape[0] or shape[1] else ((1,), ()), r)
            for shape, r in zip(shapes, rows, strict=True)
        ]
        time = max(part for part, _ in parts)
        hidden = self.model.hidden_size * 2.0
        if self.link and self.tp_size > 1:
            reduced = hidden * max(rows)
            count = 2 * self.model.num_layers + 1
            time += count * self.link.all_reduce_us(reduced, self.tp_size)
            logits = max(s for _, s in parts) * self.model.vocab_size * 2.0 / self.tp_size
            time += self.link.all_gather_us(logits, self.tp_size)
        if self.num_moe:
            time += self.num_moe * self._expert_us(rows)
        return round(time * 1000)

    def _expert_us(self, rows: Sequence[int]) -> float:
        """Return the expert part of one layer: experts of one rank, dispatch and combine."""
        model = self.model
        ranks = self.dp_size * self.tp_size if self.is_expert_parallel else 1
        gathered = sum(rows) if self.dp_size > 1 else rows[0]
        experts = model.n_routed_experts / ranks
        # distinct experts that uniform choices reach, and how much fewer a trained gate reaches
        chosen = model.moe_topk / model.n_routed_experts
        coverage = 1 - (1 - chosen) ** gathered
        active = experts * coverage * interpolate(([chosen, 0.5, 1.0], list(GATE_COVERAGE)), coverage)
        time = self.profile.moe_us(ranks, gathered, active)
        if self.link and self.dp_size > 1:
            remote = (gathered - min(rows)) / (self.dp_size - 1)
            payload = model.hidden_size * 2.0
            ids_and_weights = model.moe_topk * (4.0 + 4.0)
            time += self.link.all_gather_us(remote * (payload + ids_and_weights), self.dp_size)
            time += self.link.ring_us(remote * payload, self.dp_size - 1)
        return time
