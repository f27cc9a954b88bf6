"""Step times of a vLLM v1 engine from a layer profile, the model's shape and the engine's settings.

A step is the sum of its kernels (the profile), with these terms, none of them fitted:

* CUDA-graph padding: a step of at most ``max_capture`` tokens runs the captured graph of the next size, so dense
  kernels see that many rows (vLLM ``VllmConfig._set_cudagraph_sizes``: 1, 2, 4, 8 to 256 by 8, then by 16, up to
  min(2 x max_num_seqs, 512)).
* Logits and sampling for each scheduled sequence only.
* Unequal contexts in attention: the measured share between the time of the mean and of the longest.
* Tensor parallelism: an all-reduce after o_proj, the FFN and the embedding, an all-gather of the logits. Two ranks
  read each other's message once (vLLM's own all-reduce, one stage for two ranks) where that is not disabled and the
  message is short enough; else NCCL's ring.
* Expert parallelism: all-gathers of tokens, gate weights and expert ids before, reduce-scatter after the experts
  (vLLM's default ``allgather_reducescatter`` backend), every rank waiting for the one with most active experts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from longcat_sim.calibration.active_experts import ActiveExperts
from longcat_sim.calibration.engine_links import ONE_SHOT_BYTES, Link
from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.calibration.profile_tables import interpolate
from longcat_sim.specs.model import ModelSpec

Shape = tuple[Sequence[int], Sequence[tuple[int, int]]]
"""(decode contexts, prefill chunks of (tokens, tokens before))"""

BEFORE_LAYERS = ("embedding",)
AFTER_LAYERS = ("final_layernorm",)
DENSE_FFN = ("gate_up_proj", "act_fn", "down_proj")


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return the token counts for which CUDA graphs are captured.

    Source: vLLM ``VllmConfig._set_cudagraph_sizes``.
    """
    most = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return [size for size in sizes if size <= most]


@dataclass
class EngineTimes:
    """Times that depend on every sequence of a step (``DetailedStepTimes``); of DP ranks in lockstep too."""

    profile: LayerProfile
    model: ModelSpec
    max_num_seqs: int
    tp_size: int = 1
    dp_size: int = 1
    is_expert_parallel: bool = False
    link: Link | None = None
    is_eager: bool = False
    is_detailed: bool = True
    has_one_shot: bool = False
    """Whether two tensor-parallel ranks reduce by vLLM's own kernel."""
    captured: Sequence[int] | None = None
    """Token counts of the captured graphs, where the engine reported them."""
    scale: float = 1.0
    """What every step's time is multiplied by."""

    def __post_init__(self) -> None:
        sizes = capture_sizes(self.max_num_seqs) if self.captured is None else sorted(self.captured)
        self.sizes = [] if self.is_eager else sizes
        self.active = ActiveExperts(
            max(self.model.n_routed_experts, 1), max(self.model.moe_topk, 1), self.tp_size * self.dp_size
        )
        self.counts = {"layernorm": 2, "qk_norm": self.profile.calls_of("qk_norm")}
        self._dense: dict[int, tuple[float, float]] = {}
        moe_layers = self.model.num_moe_layers
        self.num_moe = moe_layers if self.profile.moe or self.profile.components else 0
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
                    inside += time * self.counts.get(name, 1) * self.model.num_layers
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
            if self.has_one_shot and self.tp_size == 2 and reduced <= ONE_SHOT_BYTES:
                time += count * self.link.exchange_us(reduced)
            else:
                time += count * self.link.all_reduce_us(reduced, self.tp_size)
            logits = max(s for _, s in parts) * self.model.vocab_size * 2.0 / self.tp_size
            time += self.link.all_gather_us(logits, self.tp_size)
        if self.num_moe:
            time += self.num_moe * self._expert_us(rows)
        return round(time * 1000 * self.scale)

    def _remote_us(self, gathered: int) -> float:
        """Return what the choices of other ranks' experts cost on a rank: rows of zeros, written and summed.

        Tables of whole expert layers are taken with a rank's share of experts and of choices, and lack it. Memory is as
        fast as for the weights of the logits, which no cache holds. Source: vLLM ``fused_moe`` (experts that the map
        sends elsewhere write zeros, ``moe_sum`` adds up every choice).
        """
        model = self.model
        ranks = self.dp_size * self.tp_size
        if not self.is_expert_parallel or ranks < 2:
            return 0.0
        head = model.vocab_size * model.hidden_size * 2.0 / self.tp_size
        bytes_per_us = head / interpolate(self.profile.per_sequence["lm_head"], 1)
        remote = gathered * model.moe_topk * (1 - 1 / ranks)
        return 2 * remote * model.hidden_size * 2.0 / bytes_per_us

    def _expert_us(self, rows: Sequence[int]) -> float:
        """Return the expert part of one layer: experts of one rank, dispatch and combine.

        Experts that are split by tensor instead read as many bytes and multiply as much as half as many whole ones.
        """
        model = self.model
        ranks = self.dp_size * self.tp_size
        gathered = sum(rows) if self.dp_size > 1 else rows[0]
        active = self.active.busiest(gathered) if self.is_expert_parallel else self.active.mean(gathered)
        if self.profile.components and self.is_expert_parallel:
            is_graph = bool(self.sizes) and max(rows) <= self.sizes[-1]
            time = self.profile.components.us(rows, active, is_graph)
        else:
            time = self.profile.moe_us(ranks, gathered, active) + self._remote_us(gathered)
        if self.link and self.dp_size > 1:
            hidden = [row * model.hidden_size * 2.0 for row in rows]
            chosen = [row * model.moe_topk * 4.0 for row in rows]  # gate weights (fp32), expert ids (int32)
            time += self.link.gather_group_us([hidden, chosen, chosen])
            time += self.link.scatter_parts_us(hidden)
        return time
