"""Top-k attention against brute force written with loops, and against torch's dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_sim.model.sparse import BlockSelector, ExactSelector, IndexerSelector, Keep, rows_of, topk_attention
from longcat_sim.model.sparse.blocks import summarise

torch.set_num_threads(1)  # small products: a second thread costs more than it gives


def brute_force(q: Tensor, k: Tensor, v: Tensor, kept: int, sharing: str, scale: float) -> Tensor:
    """One query and head at a time; the queries are the last of the context."""
    B, H, Q, _ = q.shape
    G, N = k.shape[1:3]
    out = torch.zeros(B, H, Q, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for t in range(Q):
            seen = N - Q + t + 1
            logits = [(k[b, h * G // H, :seen] @ q[b, h, t]) * scale for h in range(H)]
            probs = [x.softmax(-1) for x in logits]
            for h in range(H):
                group = h * G // H
                ranking = {
                    "head": logits[h],
                    "group": sum(probs[x] for x in range(H) if x * G // H == group),
                    "all": sum(probs),
                }[sharing]
                best = sorted(range(seen), key=lambda s: -float(ranking[s]))[: min(kept, seen)]
                p = logits[h][best].softmax(-1)
                out[b, h, t] = p @ v[b, group, best]
    return out


def inputs(H: int, G: int, Q: int, N: int, D: int = 8, V: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, H, Q, D), (2, G, N, D), (2, G, N, V))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("sharing", ["head", "group", "all"])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("Q", "N"), [(1, 40), (17, 17), (5, 30)])
def test_equals_brute_force(sharing: str, H: int, G: int, Q: int, N: int) -> None:
    q, k, v = inputs(H, G, Q, N)
    for chunk_bytes in (1, 2**20):  # one query at a time, and all at once
        got = topk_attention(q, k, v, Keep(count=4), selector=ExactSelector(sharing), chunk_bytes=chunk_bytes)
        torch.testing.assert_close(got, brute_force(q, k, v, 4, sharing, 8**-0.5))


def test_gather_and_mask_agree() -> None:
    """Few queries gather, many mask; the rows that both compute are equal."""
    q, k, v = inputs(6, 2, 64, 64)
    many = topk_attention(q, k, v, Keep(count=5), selector=ExactSelector("group"))
    for t in (40, 63):
        one = topk_attention(q[:, :, t : t + 1], k, v, Keep(count=5), selector=ExactSelector("group"),
                             positions=torch.tensor([t]))  # fmt: skip
        torch.testing.assert_close(one, many[:, :, t : t + 1])


@pytest.mark.parametrize("keep", [Keep(count=50), Keep(count=64), Keep(ratio=1.0)])
def test_dense_where_all_is_kept(keep: Keep) -> None:
    q, k, v = inputs(6, 2, 50, 50)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(topk_attention(q, k, v, keep), want)


def test_mla_is_one_shared_head_with_values_inside_the_keys() -> None:
    g = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 1, 90, 20, generator=g)  # 16 latent + 4 rotary
    q = torch.randn(2, 8, 2, 20, generator=g)
    inside = topk_attention(q, latent, latent[..., :16], Keep(count=7), selector=ExactSelector("all"), scale=0.3)
    apart = topk_attention(q, latent, latent[..., :16].clone(), Keep(count=7), selector=ExactSelector("all"), scale=0.3)
    torch.testing.assert_close(inside, apart)
    torch.testing.assert_close(inside, brute_force(q, latent, latent[..., :16], 7, "all", 0.3))


def test_ratio_keeps_a_share_of_what_each_query_sees() -> None:
    rows = rows_of(Keep(ratio=0.1), batch=1, queries=100, keys=100, positions=None, device=torch.device("cpu"))
    want = [max(1, int((t + 1) * 0.1 + 0.5)) for t in range(100)]
    assert rows.kept_BQ[0].tolist() == want
    assert [Keep(ratio=r).of_context(n) for r, n in ((0.01, 2048), (0.05, 2048), (0.01, 4096), (0.05, 4096))] == [
        20, 102, 41, 205,
    ]  # fmt: skip


def test_sequences_of_different_length() -> None:
    q, k, v = inputs(4, 2, 1, 30)
    both = topk_attention(q, k, v, Keep(count=3), positions=torch.tensor([[11], [29]]))
    first = topk_attention(q[:1], k[:1, :, :12], v[:1, :, :12], Keep(count=3))
    torch.testing.assert_close(both[:1], first)


def test_ties_keep_the_right_values() -> None:
    """Equal scores may be kept in any order; with equal values the output does not tell."""
    k = torch.ones(1, 1, 12, 4)
    k[:, :, 3] = 2.0
    v = torch.full((1, 1, 12, 2), 5.0)
    v[:, :, 3] = 1.0
    q = torch.ones(1, 1, 1, 4)
    got = topk_attention(q, k, v, Keep(count=3), scale=0.5)
    p = torch.tensor([4.0, 2.0, 2.0]).softmax(0)
    torch.testing.assert_close(got[0, 0, 0, 0], p[0] * 1 + (p[1] + p[2]) * 5)


def test_indexer_selector_is_sliced_with_the_chunks() -> None:
    q, k, v = inputs(4, 2, 20, 20)
    g = torch.Generator().manual_seed(3)
    selector = IndexerSelector(
        torch.randn(2, 20, 16, 5, generator=g), torch.rand(2, 20, 16, generator=g), torch.randn(2, 20, 5, generator=g)
    )  # 16 heads: where all heads are cut by the ReLU scores tie at 0
    whole = topk_attention(q, k, v, Keep(count=4), selector=selector)
    pieces = topk_attention(q, k, v, Keep(count=4), selector=selector, chunk_bytes=1)
    torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize("rule", ["bounds", "means"])
def test_page_of_one_token_ranks_like_exact(rule: str) -> None:
    """With one token to a page, bound and mean are the token's own product."""
    q, k, v = inputs(4, 2, 1, 40)
    for sharing in ("head", "group", "all"):
        got = topk_attention(q, k, v, Keep(count=6), selector=BlockSelector(rule, 1, sharing))  # type: ignore[arg-type]
        want = topk_attention(q, k, v, Keep(count=6), selector=ExactSelector(sharing))
        torch.testing.assert_close(got, want)


def test_page_bound_is_never_below_a_token_of_the_page() -> None:
    q, k, _ = inputs(4, 2, 3, 37)
    summary = summarise(k, 8)
    assert summary.low.shape[2] == 5  # 4 whole pages and one of 5 tokens
    bound = BlockSelector("bounds", 8).page_scores(q, summary, 1.0)
    exact = torch.einsum("bgqd,bgnd->bgqn", q.view(2, 2, 6, 8), k).view(2, 4, 3, 37)
    for page in range(5):
        assert bool((exact[..., page * 8 : page * 8 + 8].amax(-1) <= bound[..., page] + 1e-9).all())


def test_page_selection_takes_whole_pages_and_does_not_see_the_future() -> None:
    q, k, _ = inputs(4, 2, 40, 40)
    rows = rows_of(Keep(count=16), batch=2, queries=40, keys=40, positions=None, device=torch.device("cpu"))
    selector = BlockSelector("means", 8)
    kept = selector.select(q, k, rows, 1.0)
    assert bool((kept <= torch.arange(40)[:, None]).all())
    last = kept[:, :, 39].sort(-1).values.view(2, 4, 2, 8)
    assert bool((last // 8 == last[..., :1] // 8).all())  # 16 tokens are two whole pages
    changed = k.clone()
    changed[:, :, 30:] = 100.0  # the future of query 29, inside and outside its page
    again = selector.select(q, changed, rows, 1.0)
    assert torch.equal(kept[:, :, :30].sort(-1).values, again[:, :, :30].sort(-1).values)
