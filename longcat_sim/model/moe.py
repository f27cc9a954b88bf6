"""The shortcut MoE block: fp32 router, FFN experts as one grouped product, zero-computation experts for nothing.

Source: LongCat-Flash Technical Report, arXiv 2509.01322v2, Eq. 1; gates and order as in transformers 5,
``modeling_longcat_flash.py``. Shape letters: see ``layers.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_sim.model.layers import swiglu
from longcat_sim.specs.model import ModelSpec

FEW_ROWS = 6


class Routing(NamedTuple):
    """Choices of each token: gates times the output scale, fp32 [T, K], and expert ids [T, K]; ids >= E are zero."""

    weights_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor | None = None
    """Softmax over all experts, fp32, kept where gradients are: what balance losses are made of."""


class Rows(NamedTuple):
    """Token copies bound for FFN experts, in order of expert."""

    token_N: Tensor
    """Token of each row; on CUDA rows of zero-computation experts stand at the end and are not computed."""
    weight_N: Tensor
    """Gate of each row, fp32."""
    counts: list[int] | Tensor
    """Rows of each expert: a list on a CPU, a tensor [E] on CUDA, so that the host never waits."""


class Router(nn.Module):
    """Softmax over all experts in fp32; the bias takes part in the choice only; gates are not renormalised."""

    def __init__(self, spec: ModelSpec, *, device: torch.device) -> None:
        super().__init__()
        choices = spec.n_routed_experts + spec.zero_expert_num
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(choices, spec.hidden_size, device=device, dtype=torch.float32))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(choices, device=device, dtype=torch.float32))

    def forward(self, x_TH: Tensor) -> Routing:
        """Return the choices of each token."""
        scores_TE = F.linear(x_TH.float(), self.weight.float()).softmax(-1)
        with torch.no_grad():
            experts_TK = (scores_TE + self.e_score_correction_bias).topk(self.spec.moe_topk, -1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK) * self.spec.routed_scaling_factor
        return Routing(weights_TK, experts_TK, scores_TE if scores_TE.requires_grad else None)


class Experts(nn.Module):
    """The FFN experts ``first`` .. ``first + count - 1`` of one layer; zero-computation experts own nothing."""

    def __init__(self, spec: ModelSpec, first: int, count: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.expert_ffn_hidden_size
        self.first, self.count = first, count
        self.gate_up = nn.Parameter(torch.empty(count, 2 * inner, hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(count, hidden, inner, device=device, dtype=dtype))

    def forward(self, x_TH: Tensor, rows: Rows, out_TH: Tensor) -> Tensor:
        """Add each row's gated expert output to its token in ``out_TH`` and return it."""
        counts = rows.counts
        if isinstance(counts, Tensor):
            if x_TH.dtype == torch.bfloat16:
                return self._grouped(x_TH, rows, out_TH)
            counts = counts.tolist()  # the library's grouped product is for bf16; one wait per layer otherwise
        return self._expert_by_expert(x_TH, rows, counts, out_TH)

    def _expert_by_expert(self, x_TH: Tensor, rows: Rows, counts: list[int], out_TH: Tensor) -> Tensor:
        """Take each expert's rows through all its steps while they are in cache.

        Measured on one core, 4096 tokens, 256 experts of width 128: 229 ms, against 376 ms in three passes over all
        rows and 283 ms with the library's grouped product.
        """
        weights = rows.weight_N.to(x_TH.dtype)[:, None]
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            stop = start + count
            token = rows.token_N[start:stop]
            inner = expert_in(x_TH, token, self.gate_up[expert], weights[start:stop])
            expert_out(inner, self.down[expert], token, out_TH)
            start = stop
        return out_TH

    def _grouped(self, x_TH: Tensor, rows: Rows, out_TH: Tensor) -> Tensor:
        """Run all experts by the library's grouped product, with the group ends on the device."""
        ends_E = row_ends(rows)
        return scatter_rows(self.products(gather_rows(x_TH, rows), ends_E), rows, ends_E, out_TH)

    def products(self, x_NH: Tensor, ends_E: Tensor) -> Tensor:
        """Return the outputs [N, H] of rows in order of expert, ended by ``ends_E``; those after it are undefined."""
        inner = swiglu(F.grouped_mm(x_NH, self.gate_up.transpose(1, 2), offs=ends_E))
        return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends_E)


def row_ends(rows: Rows) -> Tensor:
    """Return where each expert's rows end [E], int32 on the device that counted them."""
    assert isinstance(rows.counts, Tensor)
    return rows.counts.cumsum(0).to(torch.int32)


def gather_rows(x_TH: Tensor, rows: Rows) -> Tensor:
    """Return the token of each row [N, H]."""
    return x_TH.index_select(0, rows.token_N)


def scatter_rows(out_NH: Tensor, rows: Rows, ends_E: Tensor, out_TH: Tensor) -> Tensor:
    """Add each computed row, times its gate, to its token in ``out_TH`` and return it.

    Rows after the last group belong to zero-computation experts; the products leave them unwritten.
    """
    computed = torch.arange(len(out_NH), device=out_NH.device) < ends_E[-1]
    out_NH = torch.where(computed[:, None], out_NH * rows.weight_N[:, None].to(out_NH.dtype), 0)
    return out_TH.index_add_(0, rows.token_N, out_NH)


def expert_in(x_TH: Tensor, token_N: Tensor, gate_up: Tensor, weight_N1: Tensor) -> Tensor:
    """Return one expert's gated inner values [N, inner]: gather, product, activation, gate."""
    inner = swiglu(_product(x_TH.index_select(0, token_N), gate_up))
    return inner * weight_N1 if torch.is_grad_enabled() else inner.mul_(weight_N1)


def expert_out(inner: Tensor, down: Tensor, token_N: Tensor, out_TH: Tensor) -> None:
    """Add one expert's output to its tokens: product and scatter."""
    out_TH.index_add_(0, token_N, _product(inner, down))


def _product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """Return x weight^T; of few rows as (weight x^T)^T, which a CPU's library runs about twice as fast.

    Measured on one core: 2 rows by [512, 512] 59 us against 146 us; 4 rows by [512, 256] 50 us against 116 us. The rows
    come back in order: a product of rows that are kept as columns takes 150 us instead of 30 to 40.
    """
    if 1 < len(x_NK) <= FEW_ROWS and x_NK.device.type == "cpu":
        return torch.mm(weight_MK, x_NK.t()).t().contiguous()
    return torch.mm(x_NK, weight_MK.t())


def sort_rows(routing: Routing, num_experts: int) -> Rows:
    """Return the rows of FFN experts ordered by expert; zero-computation choices make no row (on CUDA, idle ones)."""
    flat = routing.experts_TK.reshape(-1)
    order = flat.argsort(stable=True)
    token, weight = order // routing.experts_TK.shape[1], routing.weights_TK.reshape(-1)[order]
    if flat.device.type == "cpu":
        counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
        total = sum(counts)
        return Rows(token[:total], weight[:total], counts)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts_E.scatter_add_(0, flat.clamp(max=num_experts), torch.ones_like(flat))
    return Rows(token, weight, counts_E[:num_experts])


def zero_experts(x_TH: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Return what the zero-computation experts give: the token itself times its gates [T, H]."""
    gate = (routing.weights_TK * (routing.experts_TK >= num_experts)).sum(-1, keepdim=True)
    return x_TH * gate.to(x_TH.dtype)
