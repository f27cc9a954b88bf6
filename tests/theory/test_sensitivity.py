"""Tornado, solve-for and term-by-term comparison against closed forms; variance shares against known variances."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from longcat_sim.calibration.transfer import SHEET_ERROR
from longcat_sim.capacity.sensitivity import solve_for, terms, tornado
from longcat_sim.capacity.uncertainty import Discrepancy, measure_next, probability, uncertainty
from longcat_sim.errors import CapacityError
from longcat_sim.ops.op import FixedTimes, Op, OpTimesLike, op
from longcat_sim.specs.scenario import Scenario, scenario


def serial(of: Scenario) -> dict[str, float]:
    """A step that reads 60 GB of memory, then sends 0.5 GB."""
    memory, network = 60e9 / of.hardware.memory_bandwidth, 0.5e9 / of.hardware.scale_out.bandwidth
    return {"step_s": memory + network, "memory_s": memory, "network_s": network}


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario(
        {
            "model": "longcat-flash", "hardware": "h800-sxm", "deployment": {"num_gpus": 16, "ep_size": 16},
            "step": {"phase": "decode", "sequences_per_gpu": 8, "context_tokens": 100},
        }
    )  # fmt: skip


PATHS = ["hardware.memory_bandwidth", "hardware.scale_out.bandwidth", "hardware.scale_out.latency"]


def test_tornado_bars_are_those_of_the_closed_form(base: Scenario) -> None:
    bars = tornado(base, serial, "step_s", PATHS, by=0.2)
    memory, network = 60e9 / 3.352e12, 0.5e9 / 50e9
    assert [bar.path for bar in bars] == PATHS
    assert bars[0].at_low == pytest.approx(memory / 0.8 + network)
    assert bars[0].at_high == pytest.approx(memory / 1.2 + network)
    assert bars[0].span == pytest.approx(memory / 0.8 - memory / 1.2)
    assert bars[1].span == pytest.approx(network / 0.8 - network / 1.2)
    assert bars[2].span == 0
    whole = tornado(base, lambda s: {"memory_s": 60e9 / s.hardware.memory_bandwidth}, "memory_s", PATHS[:1])
    assert whole[0].elasticity == pytest.approx(-1)


def test_a_value_that_cannot_be_is_a_gap_with_its_reason(base: Scenario) -> None:
    bars = tornado(base, serial, "step_s", {"hardware.memory_bandwidth": (-1.0, 4e12)})
    assert bars[0].at_low is None
    assert "greater than 0" in bars[0].faults[0]


def test_solve_for_finds_the_bandwidth(base: Scenario) -> None:
    """network = 20 ms - memory, so bandwidth = 0.5 GB / that."""
    found = solve_for(base, serial, "step_s", 20e-3, "hardware.scale_out.bandwidth")
    assert found == pytest.approx(0.5e9 / (20e-3 - 60e9 / 3.352e12), rel=1e-3)
    other = base.what_if({"hardware.memory_bandwidth": "4 TB/s"})
    found = solve_for(base, serial, "step_s", other, "hardware.scale_out.bandwidth")
    assert serial(base.what_if({"hardware.scale_out.bandwidth": f"{found} B/s"}))["step_s"] == pytest.approx(
        serial(other)["step_s"], rel=1e-3
    )


def test_what_cannot_be_reached_says_what_can(base: Scenario) -> None:
    with pytest.raises(CapacityError, match=r"makes step_s 0\.001; it goes from 1\.0179 to 0\.0179998"):
        solve_for(base, serial, "step_s", 1e-3, "hardware.scale_out.bandwidth")
    with pytest.raises(CapacityError, match="expected one of step_s, memory_s, network_s; got 'tpot_s'"):
        tornado(base, serial, "tpot_s", PATHS)
    with pytest.raises(CapacityError, match="did you mean 'bandwidth'"):
        tornado(base, serial, "step_s", ["hardware.scale_out.bandwith"])


def test_terms_of_two_scenarios_add_up(base: Scenario) -> None:
    rows = terms(serial(base), serial(base.what_if({"hardware.scale_out.bandwidth": "100 GB/s"})))
    by_name = {row.name: row for row in rows}
    assert by_name["network_s"].ratio == pytest.approx(0.5)
    assert by_name["step_s"].difference == pytest.approx(
        by_name["memory_s"].difference + by_name["network_s"].difference
    )


def gaussian(index: int, stream: int, sigma: float) -> float:
    return 0.0 if index == 0 else sigma * np.random.default_rng([stream, index]).standard_normal()


def additive(indices: Mapping[str, int]) -> dict[str, float]:
    """Independent normal errors of variance 9, 4, 1 and 0."""
    sigmas = (3.0, 2.0, 1.0, 0.0)
    return {"y": 10 + sum(gaussian(i, n, s) for n, (i, s) in enumerate(zip(indices.values(), sigmas, strict=True)))}


def test_variance_shares_are_those_of_a_sum() -> None:
    found = uncertainty(additive, draws=800)
    shares = found.shares["y"]
    # with 800 draws a variance is known to sqrt(2/800) = 5 %
    assert shares["calibration"] == pytest.approx(9 / 14, abs=0.08)
    assert shares["routing"] == pytest.approx(4 / 14, abs=0.06)
    assert shares["traffic"] == pytest.approx(1 / 14, abs=0.03)
    assert shares["discrepancy"] == 0
    assert sum(shares.values()) == pytest.approx(1)
    assert found.intervals["y"].p95 - found.intervals["y"].p5 == pytest.approx(2 * 1.645 * math.sqrt(14), rel=0.08)


def test_what_only_appears_together_is_reported() -> None:
    def product(indices: Mapping[str, int]) -> dict[str, float]:
        return {"y": gaussian(indices["calibration"], 1, 1.0) * gaussian(indices["routing"], 2, 1.0)}

    assert uncertainty(product, ("calibration", "routing"), draws=100).shares["y"]["together"] == pytest.approx(1)


def test_equal_indices_give_equal_draws() -> None:
    assert uncertainty(additive, draws=8).draws["y"].tolist() == uncertainty(additive, draws=8).draws["y"].tolist()


def test_discrepancy_has_the_residuals_spread() -> None:
    residuals = (0.05, -0.02, 0.08, 0.01, -0.06)
    drawn = np.log([Discrepancy(residuals).factor(i) for i in range(1, 4000)])
    assert drawn.std() == pytest.approx(np.sqrt(np.mean(np.square(residuals))), rel=0.05)
    assert abs(drawn.mean()) < 0.005
    assert Discrepancy(residuals).factor(0) == 1
    assume = np.log([Discrepancy(spread=0.11).factor(i) for i in range(1, 4000)])
    assert assume.std() == pytest.approx(0.11, rel=0.05)
    assert Discrepancy(spread=0.0).factor(3) == 1


GEMM, NORM, SEND = op("gemm", m=1, n=1, k=1), op("norm", rows=1, width=1), op("send", message_bytes=1, ranks=2)


class Fitted(FixedTimes):
    """gemm 4 s +- 10 %, norm 1 s +- 10 %, send 2 s from a data sheet."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__({GEMM: 4.0 * scale, NORM: 1.0 * scale, SEND: 2.0})

    def draw(self, index: int) -> OpTimesLike:
        return Fitted(1.1 if index % 2 else 0.9)


def test_measure_next_ranks_by_what_would_narrow() -> None:
    def total(times: OpTimesLike) -> float:
        return sum(times.seconds(one) for one in (GEMM, NORM, SEND))

    tags = {"gemm": "measured", "norm": "measured", "send": "datasheet"}
    first, second, third = measure_next(total, Fitted(), tags, draws=10)
    assert (first.kind, second.kind, third.kind) == ("send", "gemm", "norm")
    variance = (2 * math.sinh(SHEET_ERROR)) ** 2 + 0.4**2 + 0.1**2
    assert second.share == pytest.approx(0.16 / variance)
    assert first.narrowing == pytest.approx(1 - math.sqrt(0.17 / variance))
    assert first.suite == "collectives"
    assert isinstance(GEMM, Op)


def test_a_probability_is_never_certain() -> None:
    assert probability([1, 2, 3, 4], 2.5) == pytest.approx(2.5 / 5)
    assert probability([1, 2, 3, 4], 9) == pytest.approx(4.5 / 5)
    assert probability([1, 2, 3, 4], 2.5, at_most=False) == pytest.approx(2.5 / 5)
