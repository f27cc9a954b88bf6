"""Top-k attention: each query attends the keys that a selector kept, softmax renormalised over them.

The one operation serves training and inference. In training gradients flow through the kept products only: the
choice itself is a hard mask. Works in chunks of queries, so that no [heads, queries, keys] tensor outlives a chunk,
backward included (chunks are recomputed there).

MHA has G = H, GQA G < H. MLA runs absorbed, as one shared head (G = 1) whose values are the leading columns of its
keys: pass ``v = k[..., :kv_lora_rank]``.

Shape letters: B sequences, H query heads, G KV heads, S sets of kept keys (1, G or H), Q queries, N keys, K kept,
D width of queries and keys, V width of values.

Source: arXiv 2512.03494 (hard top-k mask in training and decoding); DeepSeek-V3.2-Exp report, eq. 2 (shared set).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse.keep import Keep, Rows, rows_of
from longcat_sim.model.sparse.select import ExactSelector, Selector, head_scores, probabilities

CHUNK_BYTES = {"cpu": 4 * 2**20}
"""Scores of one chunk of queries, at most. On a CPU with 1 MiB of L2 per core, [9 heads, 1984, 64] causal: 1 MiB
193 ms, 4 MiB 114 ms, 16 MiB 151 ms, 64 MiB 349 ms. A GPU wants few large launches."""
CHUNK_BYTES_ELSEWHERE = 256 * 2**20


def topk_attention(
    q_BHQD: Tensor,
    k_BGND: Tensor,
    v_BGNV: Tensor,
    keep: Keep,
    *,
    selector: Selector | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return causal attention over the kept keys [B, H, Q, V]; dense where ``keep`` covers the context.

    ``selector`` is exact per query head unless given; ``positions`` [Q] or [B, Q] are the queries' places in the
    context, by default its last.

    Raises:
        ModelError: shapes that do not match, an empty context, positions outside it, NaN scores.
    """
    B, H, Q, N = _checked_shapes(q_BHQD, k_BGND, v_BGNV)
    rows = rows_of(keep, batch=B, queries=Q, keys=N, positions=positions, device=q_BHQD.device)
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    selector = selector or ExactSelector()
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(q_BHQD.device.type, CHUNK_BYTES_ELSEWHERE)
    step = max(1, chunk_bytes // (4 * B * H * N))
    out = []
    for start in range(0, Q, step):
        part = rows.part(start, start + step)
        seen = int(part.position_BQ.max()) + 1
        q, k, v = q_BHQD[:, :, start : start + step], k_BGND[:, :, :seen], v_BGNV[:, :, :seen]
        indices = None
        if not part.keeps_all:
            with torch.no_grad():
                indices = selector.select(q.detach(), k.detach(), part, scale)
        if step < Q and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out.append(checkpoint(attend, q, k, v, indices, part, scale, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(attend(q, k, v, indices, part, scale))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def attend(
    q_BHQD: Tensor, k_BGND: Tensor, v_BGNV: Tensor, indices_BSQK: Tensor | None, rows: Rows, scale: float
) -> Tensor:
    """Return attention of each query over its kept keys [B, H, Q, V]; over all it sees if ``indices`` is None.

    Gathers the kept rows where that reads fewer than the context holds, else masks the scores of all keys.
    """
    if indices_BSQK is None:
        return _masked(q_BHQD, k_BGND, v_BGNV, None, rows, scale)
    sets, queries, kept = indices_BSQK.shape[1:]
    heads, groups, keys = q_BHQD.shape[1], k_BGND.shape[1], k_BGND.shape[2]
    if sets not in (1, groups, heads):
        raise ModelError(f"indices: expected 1, {groups} or {heads} sets (all, KV heads, heads); got {sets}")
    if max(sets, groups) // groups * queries * kept < keys:
        return _gathered(q_BHQD, k_BGND, v_BGNV, indices_BSQK, scale)
    return _masked(q_BHQD, k_BGND, v_BGNV, indices_BSQK, rows, scale)


def _masked(
    q_BHQD: Tensor, k_BGND: Tensor, v_BGNV: Tensor, indices_BSQK: Tensor | None, rows: Rows, scale: float
) -> Tensor:
    B, H, Q, _ = q_BHQD.shape
    G, N = k_BGND.shape[1:3]
    scores = head_scores(q_BHQD, k_BGND, scale)
    if indices_BSQK is not None:
        mask = kept_mask(indices_BSQK, N)
        scores = _by_set(scores, mask.shape[1]).masked_fill(~mask[:, :, None], -torch.inf).view(B, H, Q, N)
    elif int(rows.position_BQ.min()) + 1 < N:
        scores = scores.masked_fill(~rows.visible(N)[:, None], -torch.inf)
    probs = probabilities(scores).to(v_BGNV.dtype)
    return (probs.view(B, G, (H // G) * Q, N) @ v_BGNV).view(B, H, Q, -1)


def _gathered(q_BHQD: Tensor, k_BGND: Tensor, v_BGNV: Tensor, indices_BSQK: Tensor, scale: float) -> Tensor:
    B, H, Q, D = q_BHQD.shape
    G, (S, K) = k_BGND.shape[1], (indices_BSQK.shape[1], indices_BSQK.shape[3])
    sets = max(S, G)  # one gather per set and KV head
    indices = indices_BSQK.expand(B, sets, Q, K) if S == 1 else indices_BSQK
    used = indices >= 0
    k_set = _rows_at(k_BGND, indices, sets)
    is_prefix = v_BGNV.data_ptr() == k_BGND.data_ptr() and v_BGNV.stride() == k_BGND.stride()
    v_set = k_set[..., : v_BGNV.shape[-1]] if is_prefix else _rows_at(v_BGNV, indices, sets)
    q = (q_BHQD * scale).view(B, sets, H // sets, Q, D).transpose(2, 3)  # [B, sets, Q, heads of a set, D]
    scores = q @ k_set.transpose(-1, -2)
    if used.device.type != "cpu" or not bool(used.all()):  # on a GPU the look would make the host wait
        scores = scores.masked_fill(~used[:, :, :, None], -torch.inf)
    probs = probabilities(scores).to(v_BGNV.dtype)
    return (probs @ v_set).transpose(2, 3).reshape(B, H, Q, -1)


def _rows_at(x_BGND: Tensor, indices_BSQK: Tensor, sets: int) -> Tensor:
    """Return rows of the cache [B, sets, Q, K, D]; -1 reads row 0, masked later."""
    B, G = x_BGND.shape[:2]
    batch = torch.arange(B, device=x_BGND.device)[:, None, None, None]
    head = (torch.arange(sets, device=x_BGND.device) * G // sets)[None, :, None, None]
    return x_BGND[batch, head, indices_BSQK.clamp(min=0)]


def _by_set(x_BHQN: Tensor, sets: int) -> Tensor:
    B, H, Q, N = x_BHQN.shape
    return x_BHQN.view(B, sets, H // sets, Q, N)


def kept_mask(indices_BSQK: Tensor, keys: int) -> Tensor:
    """Return which keys each row keeps [B, S, Q, keys]."""
    B, S, Q, _ = indices_BSQK.shape
    mask = torch.zeros(B, S, Q, keys + 1, dtype=torch.bool, device=indices_BSQK.device)
    mask.scatter_(-1, indices_BSQK.long().where(indices_BSQK >= 0, keys), True)
    return mask[..., :keys]


def _checked_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    faults = [
        f"{name}: expected 4 dims [{dims}]; got shape {list(x.shape)}"
        for name, x, dims in (("q", q, "B, H, Q, D"), ("k", k, "B, G, N, D"), ("v", v, "B, G, N, V"))
        if x.dim() != 4
    ]
    if not faults:
        if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
            faults.append(
                f"q, k, v: batch, KV heads and keys must agree; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        if q.shape[-1] != k.shape[-1]:
            faults.append(f"k: expected the queries' width {q.shape[-1]}; got {k.shape[-1]}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            faults.append(f"k: its {k.shape[1]} heads must divide the {q.shape[1]} query heads")
    if faults:
        raise ModelError(faults)
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]
