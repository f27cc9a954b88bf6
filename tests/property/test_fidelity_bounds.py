"""Identities and bounds of truncated attention, over random attention of all shapes and sharpness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_sim.model.sparse import ExactSelector, Keep, SyntheticSelector, attend, attention_fidelity, rows_of
from longcat_sim.model.sparse.fidelity import (
    dropped_mass_bound,
    entropy,
    logit_fidelity,
    renormalisation_kl,
    retrieval_precision,
)

torch.set_num_threads(1)  # small products: a second thread costs more than it gives


@st.composite
def attention(draw: st.DrawFn):
    G = draw(st.sampled_from([1, 2]))
    H = G * draw(st.sampled_from([1, 3]))
    N = draw(st.integers(2, 70))
    Q = draw(st.integers(1, min(4, N)))
    count = draw(st.integers(1, N))
    sharpness = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    q, k, v = (torch.randn(1, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((H, Q), (G, N), (G, N)))
    rows = rows_of(Keep(count=count), batch=1, queries=Q, keys=N, positions=None, device=q.device)
    return q * sharpness, k, v, rows


@given(attention())
@settings(max_examples=120)
def test_dropped_mass_is_bounded_by_entropy(case) -> None:
    """d <= H / ln(K + 1) must never fail; identities hold to rounding of float32."""
    q, k, v, rows = case
    kept = ExactSelector().select(q, k, rows, 8**-0.5)
    got = attention_fidelity(q, k, v, kept, rows, 8**-0.5)
    assert bool((got.dropped <= got.dropped_bound + 1e-5).all())
    assert bool((got.precision == 1).all())
    assert bool((got.entropy <= math.log(k.shape[2]) + 1e-5).all())


@given(attention())
@settings(max_examples=40)
def test_identities(case) -> None:
    q, k, v, rows = case
    scale = 8**-0.5
    kept = ExactSelector().select(q, k, rows, scale)
    got = attention_fidelity(q, k, v, kept, rows, scale)
    H, G, N = q.shape[1], k.shape[1], k.shape[2]
    for h in range(H):
        for t in range(q.shape[2]):
            seen = int(rows.position_BQ[0, t]) + 1
            p = (k[0, h * G // H, :seen] @ q[0, h, t] * scale).softmax(-1)
            inside = kept[0, h, t][kept[0, h, t] >= 0]
            sparse = torch.zeros_like(p)
            sparse[inside] = p[inside] / p[inside].sum()
            d = 1 - float(p[inside].sum())
            # total variation is the dropped mass; KL of the renormalised against dense is -ln(1 - d)
            assert float((p - sparse).abs().sum() / 2) == pytest.approx(d, abs=1e-9)
            divergence = float((sparse[inside] * (sparse[inside] / p[inside]).log()).sum())
            assert divergence == pytest.approx(renormalisation_kl(d), abs=1e-7)
            assert float(got.dropped[0, h, t]) == pytest.approx(d, abs=2e-6)
            values = v[0, h * G // H]
            dense_out, sparse_out = p @ values[:seen], sparse @ values[:seen]
            assert float((dense_out - sparse_out).norm()) <= 2 * d * float(values[:seen].norm(dim=-1).max()) + 1e-9
            ours = attend(q, k, v, kept, rows, scale)[0, h, t]
            torch.testing.assert_close(ours, sparse_out, rtol=1e-5, atol=1e-6)
            assert float(entropy(sparse[None])[0]) <= math.log(len(inside)) + 1e-9
    assert int(rows.kept_BQ.max()) <= N


@given(attention(), st.floats(0, 1), st.sampled_from(["random", "lowest"]), st.sampled_from(["head", "group", "all"]))
def test_synthetic_selection_has_its_precision(case, precision: float, miss: str, sharing: str) -> None:
    q, k, _, rows = case
    exact = ExactSelector(sharing).select(q, k, rows, 1.0)
    chosen = SyntheticSelector(precision, miss, sharing=sharing).select(q, k, rows, 1.0)  # type: ignore[arg-type]
    for s in range(exact.shape[1]):
        for t in range(q.shape[2]):
            true = set(exact[0, s, t][exact[0, s, t] >= 0].tolist())
            got = [i for i in chosen[0, s, t].tolist() if i >= 0]
            kept, seen = int(rows.kept_BQ[0, t]), int(rows.position_BQ[0, t]) + 1
            hits = math.floor(kept * precision + 0.5)
            assert len(set(got)) == len(got)
            assert all(i < seen for i in got)
            assert len(true & set(got)) == hits
            assert len(got) == hits + min(kept - hits, seen - kept)
            if miss == "lowest" and hits:
                assert set(exact[0, s, t, :hits].tolist()) <= set(got)


def test_synthetic_protects_the_best_and_repeats_from_its_seed() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=g), torch.randn(1, 2, 200, 8, generator=g)
    rows = rows_of(Keep(count=20), batch=1, queries=3, keys=200, positions=None, device=q.device)
    exact = ExactSelector().select(q, k, rows, 1.0)
    chosen = SyntheticSelector(0.3, always_keep=4, seed=5).select(q, k, rows, 1.0)
    assert bool((chosen[..., None] == exact[..., None, :4]).any(-2).all())
    assert torch.equal(chosen, SyntheticSelector(0.3, always_keep=4, seed=5).select(q, k, rows, 1.0))
    assert not torch.equal(chosen, SyntheticSelector(0.3, always_keep=4, seed=6).select(q, k, rows, 1.0))


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_bound_holds_for_any_distribution(kept: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(50, generator=g, dtype=torch.float64) * float(torch.rand(1, generator=g)) * 20, 0)
    dropped = 1 - p.sort(descending=True).values[:kept].sum()
    assert float(dropped) <= float(dropped_mass_bound(entropy(p), torch.tensor(kept))) + 1e-12


def test_bound_is_reached() -> None:
    """K + 1 equal entries: one is dropped, 1/(K+1), and the bound says 1; the limit case is one entry kept of two."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert float(dropped_mass_bound(entropy(p), torch.tensor(1))) == pytest.approx(1.0)


def test_precision_by_hand() -> None:
    shared = torch.tensor([[[[0, 1, 2, 3]]]])
    own = torch.tensor([[[[0, 1, 8, 9]], [[3, 2, 1, 0]], [[5, 6, 7, -1]], [[3, -1, -1, -1]]]])
    got = retrieval_precision(shared, own, 4, 10)
    assert got[0, :, 0].tolist() == [0.5, 1.0, 0.0, 0.25]


def test_logit_fidelity_by_hand() -> None:
    dense, sparse = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    got = logit_fidelity(sparse, dense)
    assert float(got.kl) == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert not bool(got.top1_same)
    same = logit_fidelity(dense, dense)
    assert float(same.kl) == 0
    assert bool(same.top1_same)
