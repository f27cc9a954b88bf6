"""Top-k attention in training: gradients, memory, and the indexer's two losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longcat_sim.model.sparse import ExactSelector, Keep, LightningIndexer, rows_of, topk_attention, topk_indices
from longcat_sim.model.sparse.fidelity import retrieval_precision
from longcat_sim.model.sparse.index_training import attention_target, dense_stage_loss, detached, sparse_stage_loss

torch.set_num_threads(1)  # small products: a second thread costs more than it gives


def inputs(H: int, G: int, N: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((1, H, N, 4), (1, G, N, 4), (1, G, N, 3))
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("sharing", ["head", "group", "all"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_gradients(sharing: str, chunk_bytes: int) -> None:
    """The choice is fixed at a small step, so finite differences see the hard mask's gradient."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return topk_attention(q, k, v, Keep(count=3), selector=ExactSelector(sharing), chunk_bytes=chunk_bytes)

    assert torch.autograd.gradcheck(f, inputs(4, 2, 7), fast_mode=True)


def test_nothing_flows_to_dropped_keys() -> None:
    q, k, v = inputs(2, 2, 12)
    last = q[:, :, -1:].detach().requires_grad_()
    topk_attention(last, k, v, Keep(count=3), chunk_bytes=2**20).square().sum().backward()
    rows = rows_of(Keep(count=3), batch=1, queries=1, keys=12, positions=None, device=q.device)
    kept = ExactSelector().select(last.detach(), k.detach(), rows, 0.5)[0, :, 0]
    for head in range(2):
        touched = set(k.grad[0, head].abs().sum(-1).nonzero().flatten().tolist())
        assert touched == set(kept[head].tolist())


def test_training_and_inference_are_one_operation() -> None:
    """Teacher-forced with gradients, and token by token without: the same outputs."""
    q, k, v = inputs(4, 2, 40)
    trained = topk_attention(q, k, v, Keep(ratio=0.2))
    assert trained.requires_grad
    with torch.inference_mode():
        for t in range(40):
            seen = slice(0, t + 1)
            one = topk_attention(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], Keep(ratio=0.2))
            torch.testing.assert_close(one, trained[:, :, t : t + 1])


def test_no_score_tensor_is_kept_for_backward() -> None:
    """What autograd holds is far below [heads, queries, keys] and grows with the kept keys, not with the context."""
    H, N, count = 4, 1024, 8
    q, k, v = (torch.randn(1, H, N, 8).requires_grad_() for _ in range(3))
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = topk_attention(q, k, v, Keep(count=count), chunk_bytes=2**20)
    scores = 4 * H * N * N
    assert sum(held.values()) < scores / 10, (sum(held.values()), scores)
    out.sum().backward()
    assert k.grad is not None
    assert bool(k.grad.isfinite().all())


def test_indexer_losses_are_zero_at_the_target_and_reach_the_indexer_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    rows = rows_of(Keep(count=4), batch=1, queries=10, keys=10, positions=None, device=q.device)
    target = attention_target(q, k, rows, 0.3)
    torch.testing.assert_close(target.sum(-1), torch.ones(1, 10))
    log_target = target.clamp_min(1e-30).log()
    kept = ExactSelector("all").select(q, k, rows, 0.3)[:, 0]
    for loss in (dense_stage_loss(log_target + 5, target, rows), sparse_stage_loss(log_target - 2, target, kept)):
        assert abs(float(loss)) < 1e-5
    hidden = torch.randn(1, 10, 12, requires_grad=True)
    indexer = LightningIndexer(hidden_size=12, query_size=12, index_n_heads=2, index_head_dim=6, qk_rope_head_dim=0)
    empty = torch.empty(10, 0)
    (free,) = detached(hidden)
    for loss_of in (lambda s: dense_stage_loss(s, target, rows), lambda s: sparse_stage_loss(s, target, kept)):
        indexer.zero_grad()
        loss = loss_of(indexer(free, free, empty, empty))
        assert float(loss.detach()) > 0.01
        loss.backward()
        assert hidden.grad is None
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in indexer.parameters())


def test_indexer_learns_to_find_what_attention_looks_at() -> None:
    """Attention that a small indexer can express: precision rises far above chance in both stages."""
    torch.manual_seed(0)
    N, count = 128, 12
    hidden = torch.randn(1, N, 16)
    wq, wk = torch.randn(16, 8), torch.randn(16, 8)
    q, k = (hidden @ wq)[:, None], (hidden @ wk)[:, None]
    rows = rows_of(Keep(count=count), batch=1, queries=N, keys=N, positions=None, device=hidden.device)
    target = attention_target(q, k, rows, 0.05)
    exact = ExactSelector("all").select(q, k, rows, 0.05)
    indexer = LightningIndexer(hidden_size=16, query_size=16, index_n_heads=8, index_head_dim=16, qk_rope_head_dim=0)
    empty = torch.empty(N, 0)
    optimizer = torch.optim.AdamW(indexer.parameters(), lr=3e-2)
    precision = []
    for step in range(200):
        scores = indexer(hidden, hidden, empty, empty)
        chosen = topk_indices(scores.detach()[:, None], rows)
        precision.append(float(retrieval_precision(chosen, exact, 1, N)[:, :, 60:].mean()))
        if step < 150:
            loss = dense_stage_loss(scores, target, rows)
        else:
            loss = sparse_stage_loss(scores, target, chosen[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert precision[0] < 0.3
    assert precision[149] > 0.8, precision[149]
    assert precision[-1] > 0.8, precision[-1]
