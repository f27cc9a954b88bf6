"""The routing fit: parameters that made a trace are found again, and resampled traces keep its moments at any size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longcat_sim.errors import MeasurementError
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.records.routing_fit import LayerFit, RoutingFit, fit_routing, moments

TRUE = LayerFit(
    ffn_share=(0.62, 0.73), token_std=(1.2, 0.8), sequence_std=(0.3, 0.5), ffn_std=(0.5, 0.8), zero_std=(0.4, 0.4),
    mixed_std=0.1,
)  # fmt: skip
MIX = {"prose": 0.6, "code": 0.4}
SEQUENCE = 64


def true_fit(experts: int = 32, zero: int = 16) -> RoutingFit:
    return RoutingFit(("prose", "code"), (0.6, 0.4), (TRUE,), experts, zero, 12, 8.0)


def traces(fit: RoutingFit, experts: int, zero: int, seed: int, sequences: int = 64) -> dict[str, RoutingTrace]:
    return {
        name: fit.resample(
            n_routed_experts=experts, zero_expert_num=zero, moe_topk=12, expected_ffn_experts=8.0, num_layers=2,
            sequences=sequences, sequence_tokens=SEQUENCE, domain=name, seed=seed,
        )
        for name in MIX
    }  # fmt: skip


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, RoutingTrace], RoutingFit]:
    made = traces(true_fit(), 32, 16, seed=5)
    return made, fit_routing(made, MIX, sequence_tokens=SEQUENCE)


def test_moments_of_a_trace_by_hand() -> None:
    """Two sequences of two tokens, 2 + 1 experts, K = 2."""
    chosen = np.array([[[0, 1], [0, 2]], [[0, 2], [1, 2]]], dtype=np.int32).reshape(1, 4, 2)
    got = moments({"a": RoutingTrace(chosen, 2, 1)}, np.array([1.0]), 2)[0]
    assert got.mean[0] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    assert got.token_std[0] == pytest.approx(np.std([1, 0.5, 0.5, 0.5]))
    # halves: sequence 0 loads (2, 1), sequence 1 loads (1, 1): relative (1/3, -1/3) and (0, 0): no common skew
    assert got.ffn_skew[0] == pytest.approx(0.0)


def test_balanced_over_the_mix_but_not_in_a_domain() -> None:
    made = traces(true_fit(), 32, 16, seed=2)
    loads = np.stack([t.tokens_per_expert()[:, :32] / t.tokens_per_expert()[:, :32].sum(1, keepdims=True)
                      for t in made.values()])  # fmt: skip
    mixed = np.tensordot([0.6, 0.4], loads, 1)
    assert (loads.std(2) / loads.mean(2)).min() > 0.2
    assert (mixed.std(1) / mixed.mean(1)).max() < 0.2


def test_fit_finds_the_moments_again(found: tuple[dict[str, RoutingTrace], RoutingFit]) -> None:
    made, fit = found
    again = traces(fit, 32, 16, seed=77)
    shares = np.array([0.6, 0.4])
    want = moments(made, shares, SEQUENCE)
    got = moments(again, shares, SEQUENCE)

    def pooled(rows: list, name: str) -> np.ndarray:
        return np.mean([getattr(m, name) for m in rows], axis=0)

    assert fit.expected_ffn_experts == pytest.approx(8.0, rel=0.03)
    assert pooled(got, "mean") == pytest.approx(pooled(want, "mean"), rel=0.04)
    assert pooled(got, "token_std") == pytest.approx(pooled(want, "token_std"), rel=0.08)
    assert pooled(got, "ffn_skew") == pytest.approx(pooled(want, "ffn_skew"), rel=0.30)  # 32 random experts, 2 layers
    assert pooled(got, "mean")[1] > pooled(got, "mean")[0]  # as in the domains that it was made of


def test_resample_at_the_published_size(found: tuple[dict[str, RoutingTrace], RoutingFit]) -> None:
    _, fit = found
    trace = fit.resample(
        n_routed_experts=512, zero_expert_num=256, moe_topk=12, expected_ffn_experts=8.0, num_layers=2, sequences=16,
        sequence_tokens=SEQUENCE,
    )  # fmt: skip
    assert trace.experts.shape == (2, 16 * SEQUENCE, 12)
    assert trace.ffn_experts().mean() == pytest.approx(8.0, rel=0.06)  # 16 sequences whose means differ
    assert trace.ffn_experts().std() > 1.63  # more than independent choices give
    assert all(len(set(row)) == 12 for row in trace.experts[0, :200].tolist())
    assert trace.imbalance(32).mean() > 1.02
    same = fit.resample(
        n_routed_experts=512, zero_expert_num=256, moe_topk=12, expected_ffn_experts=8.0, num_layers=2, sequences=16,
        sequence_tokens=SEQUENCE,
    )  # fmt: skip
    assert np.array_equal(trace.experts, same.experts)


def test_without_zero_experts_all_choices_are_ffn(found: tuple[dict[str, RoutingTrace], RoutingFit]) -> None:
    _, fit = found
    trace = fit.resample(
        n_routed_experts=64, zero_expert_num=0, moe_topk=8, expected_ffn_experts=8.0, num_layers=1, sequences=4,
        sequence_tokens=8,
    )  # fmt: skip
    assert (trace.ffn_experts() == 8).all()


def test_document_and_faults(found: tuple[dict[str, RoutingTrace], RoutingFit]) -> None:
    made, fit = found
    assert RoutingFit.from_json(json.loads(str(fit))) == fit
    with pytest.raises(MeasurementError, match="document of RoutingFit"):
        RoutingFit.from_json({"domains": []})
    with pytest.raises(MeasurementError, match="whole sequences of 60"):
        fit_routing(made, MIX, sequence_tokens=60)
    with pytest.raises(MeasurementError, match="expected one of prose, code; got 'maths'"):
        fit.resample(
            n_routed_experts=8, zero_expert_num=4, moe_topk=3, expected_ffn_experts=2, num_layers=1, domain="maths"
        )
    with pytest.raises(MeasurementError, match="expected_ffn_experts <= moe_topk"):
        fit.resample(n_routed_experts=8, zero_expert_num=4, moe_topk=3, expected_ffn_experts=4, num_layers=1)


def test_packaged_fit_at_the_published_size() -> None:
    """Mean 8 by construction; the spread over tokens is carried over, not set."""
    fit = RoutingFit.load()
    trace = fit.resample(
        n_routed_experts=512, zero_expert_num=256, moe_topk=12, expected_ffn_experts=8.0, num_layers=2, sequences=32,
        sequence_tokens=32,
    )  # fmt: skip
    counts = trace.ffn_experts()
    assert counts.mean() == pytest.approx(8.0, rel=0.04)
    assert 2.2 < counts.std() < 3.3
    with pytest.raises(MeasurementError, match="expected one of bytes-32e or a file"):
        RoutingFit.load("nowhere")
