"""The lightning indexer of DeepSeek sparse attention: few small heads and one shared key choose the kept tokens.

    score(t, s) = sum over heads j of weight(t, j) * ReLU(query(t, j) . key(s))

One set per token serves all attention heads. The published model rotates queries and keys by a Hadamard matrix and
scores in FP8; the rotation is orthogonal and leaves the products as they are, so it is not done here.

Shape letters: B sequences, Q query tokens, N key tokens, C hidden width, L width of the query latent, I indexer heads,
E width of an indexer head, P rotary pairs (half the rotated width), K kept.

Source: DeepSeek-V3.2-Exp report, eq. 1 and 2; its inference/model.py for projections, norm, rotary part and scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat_sim.errors import ModelError
from longcat_sim.model.layers import rotate
from longcat_sim.model.sparse.keep import Rows
from longcat_sim.model.sparse.select import topk_indices


def index_scores(q_BQIE: Tensor, k_BNE: Tensor, weight_BQI: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """Return the index scores [B, Q, N] in float32; products of all heads live for one chunk of keys only.

    Raises:
        ModelError: dims that do not match.
    """
    B, Q, heads, width = q_BQIE.shape
    if k_BNE.shape[0] != B or k_BNE.shape[-1] != width or tuple(weight_BQI.shape) != (B, Q, heads):
        raise ModelError(
            f"indexer: expected keys [{B}, N, {width}] and weights [{B}, {Q}, {heads}] for queries "
            f"{list(q_BQIE.shape)}; got {list(k_BNE.shape)} and {list(weight_BQI.shape)}"
        )
    if chunk_bytes is None:  # measured: 256 KiB beats 1 MiB by 1.1x and 16 MiB by 1.5x on a core with 1 MiB of L2
        chunk_bytes = 2**18 if k_BNE.device.type == "cpu" else 2**28
    step = max(64, chunk_bytes // (4 * B * Q * heads))
    q = q_BQIE.reshape(B, Q * heads, width)
    weight = weight_BQI.float()[:, :, None]
    parts = []
    for start in range(0, k_BNE.shape[1], step):
        products = (q @ k_BNE[:, start : start + step].transpose(-1, -2)).float().relu_()
        parts.append((weight @ products.view(B, Q, heads, -1))[:, :, 0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class IndexerSelector:
    """The choice of a lightning indexer whose queries, weights and keys are given: one set for all heads."""

    def __init__(self, q_BQIE: Tensor, weight_BQI: Tensor, k_BNE: Tensor) -> None:
        self.q_BQIE, self.weight_BQI, self.k_BNE = q_BQIE, weight_BQI, k_BNE

    def select(self, q_BHQD: Tensor, k_BGND: Tensor, rows: Rows, scale: float) -> Tensor:
        """Return the kept keys [B, 1, Q, K]; the attention's own queries and keys play no part."""
        part = slice(rows.first, rows.first + q_BHQD.shape[2])
        seen = k_BGND.shape[2]
        if self.q_BQIE.shape[1] < part.stop or self.k_BNE.shape[1] < seen:
            raise ModelError(
                f"indexer: expected at least {part.stop} queries and {seen} keys, as the attention has; got "
                f"{self.q_BQIE.shape[1]} and {self.k_BNE.shape[1]}"
            )
        scores = index_scores(self.q_BQIE[:, part], self.k_BNE[:, :seen], self.weight_BQI[:, part])
        return topk_indices(scores[:, None], rows, "index scores")


class LightningIndexer(nn.Module):
    """Projections of the indexer. Parameter names are those of published checkpoints."""

    def __init__(
        self,
        *,
        hidden_size: int,
        query_size: int,
        index_n_heads: int = 64,
        index_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        is_interleaved: bool = False,
    ) -> None:
        """Build the projections.

        ``query_size`` is the width of what queries are made from (the MLA query latent); ``is_interleaved`` rotates
        neighbouring pairs instead of halves. Published code has had both; the halves are the later one.
        """
        super().__init__()
        if min(hidden_size, query_size, index_n_heads, index_head_dim) < 1:
            raise ModelError(
                f"indexer: expected positive sizes; got hidden_size={hidden_size}, query_size={query_size}, "
                f"index_n_heads={index_n_heads}, index_head_dim={index_head_dim}"
            )
        if qk_rope_head_dim % 2 or not 0 <= qk_rope_head_dim <= index_head_dim:
            raise ModelError(
                f"qk_rope_head_dim: expected an even number, at most index_head_dim = {index_head_dim}; got "
                f"{qk_rope_head_dim}"
            )
        self.index_n_heads, self.index_head_dim = index_n_heads, index_head_dim
        self.qk_rope_head_dim, self.is_interleaved = qk_rope_head_dim, is_interleaved
        self.wq_b = nn.Linear(query_size, index_n_heads * index_head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, index_n_heads, bias=False)

    def keys(self, hidden_BNC: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
        """Return the shared keys [B, N, E], which a cache keeps."""
        return self._rotate(self.k_norm(self.wk(hidden_BNC)), cos_NP, sin_NP)

    def queries(self, latent_BQL: Tensor, cos_QP: Tensor, sin_QP: Tensor) -> Tensor:
        """Return the queries [B, Q, I, E]."""
        q = self.wq_b(latent_BQL).unflatten(-1, (self.index_n_heads, self.index_head_dim))
        return self._rotate(q, cos_QP[..., None, :], sin_QP[..., None, :])

    def weights(self, hidden_BQC: Tensor) -> Tensor:
        """Return the head weights [B, Q, I] in float32, scaled by both head count and head width."""
        return self.weights_proj(hidden_BQC).float() * (self.index_n_heads * self.index_head_dim) ** -0.5

    def forward(
        self, hidden_BQC: Tensor, latent_BQL: Tensor, cos_QP: Tensor, sin_QP: Tensor, k_BNE: Tensor | None = None
    ) -> Tensor:
        """Return index scores [B, Q, N] against ``k_BNE``, by default the tokens' own keys; not masked."""
        k = self.keys(hidden_BQC, cos_QP, sin_QP) if k_BNE is None else k_BNE
        return index_scores(self.queries(latent_BQL, cos_QP, sin_QP), k, self.weights(hidden_BQC))

    def selector(
        self, hidden_BQC: Tensor, latent_BQL: Tensor, cos_QP: Tensor, sin_QP: Tensor, k_BNE: Tensor
    ) -> IndexerSelector:
        """Return the choice for these tokens against the cached keys."""
        return IndexerSelector(self.queries(latent_BQL, cos_QP, sin_QP), self.weights(hidden_BQC), k_BNE)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = self.qk_rope_head_dim
        if not width:
            return x
        if cos.shape[-1] != width // 2 or sin.shape[-1] != width // 2:
            raise ModelError(f"cos, sin: expected {width // 2} pairs (qk_rope_head_dim / 2); got {cos.shape[-1]}")
        turn = rotate if self.is_interleaved else rotate_halves
        return torch.cat([turn(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` [..., 2P] rotated; a pair is one value of each half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
