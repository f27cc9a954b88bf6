"""Multi-head latent attention, twice: naive (latents expanded to keys and values) and absorbed (heads read latents).

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (MLA, absorption); LongCat-Flash Technical Report, arXiv
2509.01322v2, Eq. 7 (alpha_q, alpha_kv), placed where transformers 5, ``modeling_longcat_flash.py``, puts them.
Shape letters: see ``layers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_sim.errors import ModelError
from longcat_sim.model.layers import RMSNorm, rotate
from longcat_sim.model.sparse.attention import kept_mask
from longcat_sim.model.sparse.keep import Keep, rows_of
from longcat_sim.model.sparse.select import shared_scores, topk_indices
from longcat_sim.specs.model import ModelSpec

# The norms inside MLA keep the default of the published code and not the config's rms_norm_eps.
# Source: transformers 5, modeling_longcat_flash.py, LongcatFlashMLA (LongcatFlashRMSNorm without eps).
LATENT_NORM_EPS = 1e-6
# Queries per block of the naive core on a CPU; of 64, 128, 256 the fastest on [64, 512, 96] (66, 85, 119 ms).
QUERY_BLOCK = 64


@dataclass(frozen=True)
class AttentionVariant:
    """How cached attention is computed in decode."""

    kind: Literal["absorbed", "naive", "topk"] = "absorbed"
    topk: int = 0
    """Positions kept by ``topk``: the exact largest scores, found after all scores are computed."""
    share_heads: bool = False
    """Whether the heads of a token share one set (by summed probability) or each has its own."""

    def __post_init__(self) -> None:
        if self.kind not in ("absorbed", "naive", "topk"):
            raise ModelError(f"attention: expected absorbed, naive or topk; got {self.kind!r}")
        if (self.kind == "topk") != (self.topk > 0):
            raise ModelError(f"attention: topk must be >= 1 with kind='topk' and 0 otherwise; got {self.topk}")


class MLA(nn.Module):
    """One latent attention block."""

    def __init__(self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        heads, hidden = spec.num_attention_heads, spec.hidden_size
        kw: dict = {"bias": False, "device": device, "dtype": dtype}
        self.down = nn.Linear(hidden, spec.q_lora_rank + spec.kv_lora_rank + spec.qk_rope_head_dim, **kw)
        """q_a and kv_a in one product."""
        self.q_norm = RMSNorm(spec.q_lora_rank, LATENT_NORM_EPS, device=device, dtype=dtype)
        self.kv_norm = RMSNorm(spec.kv_lora_rank, LATENT_NORM_EPS, device=device, dtype=dtype)
        self.q_up = nn.Linear(spec.q_lora_rank, heads * spec.qk_head_dim, **kw)
        self.kv_up = nn.Linear(spec.kv_lora_rank, heads * (spec.qk_nope_head_dim + spec.v_head_dim), **kw)
        self.out = nn.Linear(heads * spec.v_head_dim, hidden, **kw)

    def project(self, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [T, n, D], rotated and with the softmax scale inside, and latents [T, C + R] to cache.

        Both norms take the scale corrections as a gain: q is linear in its norm's output, so that alpha_q and the
        softmax scale may multiply there.
        """
        spec = self.spec
        q_TA, c_TC, rope_TR = self.down(x_TH).split(
            [spec.q_lora_rank, spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1
        )
        scale = spec.mla_scale_q_lora * spec.qk_head_dim**-0.5
        q_TnD = self.q_up(self.q_norm(q_TA, scale)).view(-1, spec.num_attention_heads, spec.qk_head_dim)
        nope = spec.qk_nope_head_dim
        q_rope = rotate(q_TnD[..., nope:], cos_TR[:, None], sin_TR[:, None])
        if torch.is_grad_enabled():
            q_TnD = torch.cat([q_TnD[..., :nope], q_rope], dim=-1)
        else:
            q_TnD[..., nope:] = q_rope
        latent = torch.cat([self.kv_norm(c_TC, spec.mla_scale_kv_lora), rotate(rope_TR, cos_TR, sin_TR)], dim=-1)
        return q_TnD, latent

    def naive_core(self, q_BQnD: Tensor, latent_BLD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return attention over expanded latents [T, n*V]; causal, the queries being the last positions.

        ``visible`` [B, Q, L] replaces the causal rule where sequences differ in length.
        """
        spec = self.spec
        B, Q, n = q_BQnD.shape[:3]
        L, nope = latent_BLD.shape[1], spec.qk_nope_head_dim
        c_BLC, rope_BLR = latent_BLD.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        kv = self.kv_up(c_BLC).view(B, L, n, nope + spec.v_head_dim)
        k_BnLD = torch.cat([kv[..., :nope], rope_BLR[:, :, None].expand(B, L, n, -1)], dim=-1).transpose(1, 2)
        q_BnQD, v_BnLV = q_BQnD.transpose(1, 2), kv[..., nope:].transpose(1, 2)
        if q_BQnD.device.type != "cpu" or torch.is_grad_enabled():
            out = _sdpa(q_BnQD, k_BnLD, v_BnLV, visible)
        else:
            out = _blocked(q_BnQD, k_BnLD, v_BnLV, visible)
        return out.transpose(1, 2).reshape(B * Q, n * spec.v_head_dim)

    def absorbed_core(
        self,
        q_BQnD: Tensor,
        latent_BLD: Tensor,
        visible: Tensor | None,
        variant: AttentionVariant,
        length: int | None = None,
    ) -> Tensor:
        """Return attention with the up-projections moved to the query and the output side [T, n*V].

        ``visible`` [B, Q, L] is False where a query may not look; None where every query sees the first ``length`` of
        all L (by default L; fewer on a GPU only, whose products want aligned rows).
        """
        spec = self.spec
        B, Q, n, _ = q_BQnD.shape
        if variant.kind == "topk" and visible is None:
            latent_BLD = latent_BLD[:, :length]
        L, nope, C = latent_BLD.shape[1], spec.qk_nope_head_dim, spec.kv_lora_rank
        up_nXC = self.kv_up.weight.view(n, nope + spec.v_head_dim, C)
        q_nTC = torch.bmm(q_BQnD[..., :nope].reshape(B * Q, n, nope).transpose(0, 1), up_nXC[:, :nope])
        q_TnD = torch.cat([q_nTC.transpose(0, 1), q_BQnD[..., nope:].reshape(B * Q, n, -1)], dim=-1)
        if (variant.kind == "topk" and variant.topk < L) or q_BQnD.device.type != "cpu" or torch.is_grad_enabled():
            context_BXC = _two_products(q_TnD.view(B, Q, n, -1), latent_BLD, C, visible, variant, length or L)
        else:
            # One kernel that reads the latents once: 2.9 ms against 3.4 ms on [8, 2048, 160], 6.3 against 9.0 at 288.
            mask = None if visible is None else visible.repeat_interleave(n, dim=1)[:, None]
            keys = latent_BLD[:, None]
            context_BXC = F.scaled_dot_product_attention(q_TnD.view(B, 1, Q * n, -1), keys, keys, mask, scale=1.0)
            context_BXC = context_BXC[:, 0, :, :C]
        context_nTC = context_BXC.reshape(B * Q, n, C).transpose(0, 1)
        return torch.bmm(context_nTC, up_nXC[:, nope:].transpose(1, 2)).transpose(0, 1).reshape(B * Q, -1)


def _two_products(
    q_BQnD: Tensor, latent_BLD: Tensor, C: int, visible: Tensor | None, variant: AttentionVariant, length: int
) -> Tensor:
    """Return softmax(q latent^T) latent [B, Q*n, C] with all scores in memory, for a variant to choose among them."""
    B, Q, n, _ = q_BQnD.shape
    scores = torch.bmm(q_BQnD.view(B, Q * n, -1), latent_BLD.transpose(1, 2)).view(B, Q, n, -1)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    elif length < scores.shape[-1]:
        scores[..., length:] = -torch.inf
    if variant.kind == "topk" and variant.topk < scores.shape[-1]:
        scores = keep_topk(scores, variant.topk, share_heads=variant.share_heads)
    if scores.device.type == "cpu":
        probabilities = scores.softmax(-1, dtype=torch.float32).to(q_BQnD.dtype)
    else:  # the kernel computes in fp32 and rounds once: the same values in one pass
        probabilities = scores.softmax(-1)
    return torch.bmm(probabilities.view(B, Q * n, -1), latent_BLD[..., :C])


def keep_topk(scores: Tensor, k: int, *, share_heads: bool) -> Tensor:
    """Return scores [B, Q, n, L] with all but the exact ``k`` largest of each query at -inf."""
    B, Q, _, L = scores.shape
    last = torch.full((Q,), L - 1, device=scores.device)
    rows = rows_of(Keep(count=k), batch=B, queries=Q, keys=L, positions=last, device=scores.device)
    ranked = shared_scores(scores.transpose(1, 2), "all" if share_heads else "head", 1)
    keep = kept_mask(topk_indices(ranked, rows), L).transpose(1, 2)
    return scores.masked_fill(~keep, -torch.inf)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Return attention by the library's kernel; v is padded to q's width, without which the fused kernels refuse."""
    Q, L, width = q.shape[2], k.shape[2], v.shape[-1]
    mask = None if visible is None else visible[:, None]
    if mask is None and Q != L:
        mask = torch.ones(Q, L, dtype=torch.bool, device=q.device).tril(L - Q)
    out = F.scaled_dot_product_attention(
        q, k, F.pad(v, (0, q.shape[-1] - width)), mask, is_causal=mask is None, scale=1.0
    )
    return out[..., :width]


def _blocked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Return attention on a CPU, block of queries by block, so that keys after a block are never multiplied."""
    B, n, Q, D = q.shape
    L = k.shape[2]
    q, k, v = q.reshape(B * n, Q, D), k.reshape(B * n, L, D).transpose(1, 2), v.reshape(B * n, L, -1)
    out = q.new_empty(B * n, Q, v.shape[-1])
    above = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=q.device).triu(1)
    for start in range(0, Q, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, Q)
        size, reach = stop - start, L - Q + stop if visible is None else L
        scores = torch.bmm(q[:, start:stop], k[:, :, :reach])
        if visible is None:
            scores[:, :, reach - size :].masked_fill_(above[:size, :size], -torch.inf)
        else:
            scores.view(B, n, size, L).masked_fill_(~visible[:, None, start:stop], -torch.inf)
        out[:, start:stop] = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v[:, :reach])
    return out.view(B, n, Q, -1)
