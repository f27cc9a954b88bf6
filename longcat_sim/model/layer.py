"""One LongCat-Flash layer, cut into the segments that schedules order: each can be run and timed on its own.

    h0 = x  + MLA0(norm(x))        segment mla0
    n0 = norm(h0)                  segment mla0 (the one tensor that forks)
    s  = MoE(n0)                   segments router, dispatch, experts, combine
    h1 = h0 + FFN0(n0)             segment ffn0
    h2 = h1 + MLA1(norm(h1))       segments mla1_proj, mla1_core
    y  = h2 + FFN1(norm(h2)) + s   segments ffn1, add

Source: LongCat-Flash Technical Report, arXiv 2509.01322v2, section 2.2; transformers 5, ``modeling_longcat_flash.py``.
Shape letters: see ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longcat_sim.model.attention import MLA, AttentionVariant
from longcat_sim.model.cache import CachePlan, LatentCache
from longcat_sim.model.layers import DenseFFN, RMSNorm
from longcat_sim.model.moe import Experts, Router, Routing, Rows, sort_rows, zero_experts
from longcat_sim.specs.model import ModelSpec


@dataclass
class Step:
    """What all layers of one pass share."""

    batch: int
    queries: int
    cos_TR: Tensor
    sin_TR: Tensor
    cache: LatentCache | None = None
    plan: CachePlan | None = None
    variant: AttentionVariant | None = None
    """None: naive (prefill and no cache)."""
    visible_BQL: Tensor | None = None
    """Where queries may look, when that is not plainly causal."""
    routing: list[Tensor] | None = None
    """Collects each layer's chosen experts [T, K], if anybody asks."""


@dataclass
class LayerState:
    """The tensors that pass from segment to segment; each is there once its segment has run."""

    x_TH: Tensor
    h_TH: Tensor = field(init=False)
    """The residual stream: h0, h1, h2 in turn."""
    n0_TH: Tensor = field(init=False)
    q_TnD: Tensor = field(init=False)
    latent_TD: Tensor = field(init=False)
    routing: Routing = field(init=False)
    rows: Rows = field(init=False)
    moe_TH: Tensor = field(init=False)
    extra: dict = field(default_factory=dict)
    """What an expert-parallel run keeps between its segments."""


def attend(mla: MLA, sublayer: int, q_TnD: Tensor, latent_TD: Tensor, step: Step) -> Tensor:
    """Return the core attention's output [T, n*V], from the cache where there is one."""
    q_BQnD = q_TnD.view(step.batch, step.queries, *q_TnD.shape[1:])
    if step.cache is None or step.plan is None:
        latent_BLD = latent_TD.view(step.batch, step.queries, -1)
    else:
        step.cache.write(sublayer, step.plan, latent_TD)
        latent_BLD = step.cache.read(sublayer, step.plan).to(q_TnD.dtype)
    length = latent_BLD.shape[1] if step.plan is None else step.plan.longest
    if step.variant is None or step.variant.kind == "naive":
        seen_BLD = latent_BLD[:, :length] if step.visible_BQL is None else latent_BLD
        return mla.naive_core(q_BQnD, seen_BLD, step.visible_BQL)
    return mla.absorbed_core(q_BQnD, latent_BLD, step.visible_BQL, step.variant, length)


class Layer(nn.Module):
    """Two MLA blocks, two dense FFNs, one shortcut MoE. ``experts`` is the range of FFN experts held here."""

    def __init__(
        self, spec: ModelSpec, index: int, experts: range, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        norm: dict[str, Any] = {"eps": spec.rms_norm_eps, "device": device, "dtype": dtype}
        self.input_norm = nn.ModuleList([RMSNorm(spec.hidden_size, **norm) for _ in range(2)])
        self.post_norm = nn.ModuleList([RMSNorm(spec.hidden_size, **norm) for _ in range(2)])
        self.attention = nn.ModuleList([MLA(spec, device=device, dtype=dtype) for _ in range(2)])
        self.ffn = nn.ModuleList(
            [DenseFFN(spec.hidden_size, spec.ffn_hidden_size, device=device, dtype=dtype) for _ in range(2)]
        )
        self.router = Router(spec, device=device)
        self.experts = Experts(spec, experts.start, len(experts), device=device, dtype=dtype)

    @property
    def segments(self) -> Mapping[str, Callable[[LayerState, Step], None]]:
        """The segments by name, in the order of a plain pass; each reads and writes the state."""
        return {
            "mla0": self.mla0,
            "router": self.route,
            "dispatch": self.dispatch,
            "experts": self.run_experts,
            "combine": self.combine,
            "ffn0": self.ffn0,
            "mla1_proj": self.mla1_proj,
            "mla1_core": self.mla1_core,
            "ffn1": self.ffn1,
            "add": self.add,
        }

    def forward(self, x_TH: Tensor, step: Step) -> Tensor:
        """Return the layer's output [T, H]."""
        state = LayerState(x_TH)
        for segment in self.segments.values():
            segment(state, step)
        return state.x_TH

    def mla0(self, state: LayerState, step: Step) -> None:
        """Run the first attention block and the norm whose output forks."""
        mla: Any = self.attention[0]
        q_TnD, latent_TD = mla.project(self.input_norm[0](state.x_TH), step.cos_TR, step.sin_TR)
        state.h_TH = state.x_TH + mla.out(attend(mla, 2 * self.index, q_TnD, latent_TD, step))
        state.n0_TH = self.post_norm[0](state.h_TH)

    def route(self, state: LayerState, step: Step) -> None:
        """Choose the experts of each token."""
        state.routing = self.router(state.n0_TH)
        if step.routing is not None:
            step.routing.append(state.routing.experts_TK.detach())

    def dispatch(self, state: LayerState, step: Step) -> None:
        """Sort the token copies by expert."""
        state.rows = sort_rows(state.routing, self.spec.n_routed_experts)

    def run_experts(self, state: LayerState, step: Step) -> None:
        """Run the experts on top of what the zero-computation experts give."""
        base_TH = zero_experts(state.n0_TH, state.routing, self.spec.n_routed_experts)
        state.moe_TH = self.experts(state.n0_TH, state.rows, base_TH)

    def combine(self, state: LayerState, step: Step) -> None:
        """Do nothing: on one device the experts already add to their tokens."""

    def ffn0(self, state: LayerState, step: Step) -> None:
        """Run the first dense FFN."""
        ffn: Any = self.ffn[0]
        state.h_TH = state.h_TH + ffn(state.n0_TH)

    def mla1_proj(self, state: LayerState, step: Step) -> None:
        """Project queries and latents of the second attention block."""
        norm: Any = self.input_norm[1]
        x_TH = norm(state.h_TH)
        mla: Any = self.attention[1]
        state.q_TnD, state.latent_TD = mla.project(x_TH, step.cos_TR, step.sin_TR)

    def mla1_core(self, state: LayerState, step: Step) -> None:
        """Run the second attention's core and its output projection."""
        mla: Any = self.attention[1]
        out = attend(mla, 2 * self.index + 1, state.q_TnD, state.latent_TD, step)
        state.h_TH = state.h_TH + mla.out(out)

    def ffn1(self, state: LayerState, step: Step) -> None:
        """Run the second dense FFN."""
        norm: Any = self.post_norm[1]
        ffn: Any = self.ffn[1]
        state.h_TH = state.h_TH + ffn(norm(state.h_TH))

    def add(self, state: LayerState, step: Step) -> None:
        """Join the shortcut."""
        state.x_TH = state.h_TH + state.moe_TH
