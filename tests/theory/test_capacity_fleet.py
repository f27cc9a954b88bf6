"""Fleets against hand calculations: highest rate, users, spares, growth, a diurnal day."""

from __future__ import annotations

import math

import pytest

from longcat_sim.capacity.fleet import diurnal_day, growth, loss_probability, max_rate, replicas_for, users
from longcat_sim.errors import CapacityError


def test_the_highest_rate_of_an_mm1_queue() -> None:
    """Sojourn 1 / (mu - lambda) <= 0.5 s with mu = 10 /s: lambda = 8."""

    def run(rate: float) -> dict[str, object]:
        mean = math.inf if rate >= 10 else 1 / (10 - rate)
        return {"is_met": mean <= 0.5, "sojourn_s": mean}

    for start in (0.1, 1.0, 300.0):
        found = max_rate(run, start, rtol=0.005)
        assert 8 / 1.005 <= found.requests_per_s <= 8
        assert found.above_requests_per_s is not None
        assert found.above_requests_per_s > 8
        assert found.at_rate["is_met"]
    assert max_rate(run, 1.0, highest=4.0).requests_per_s == 4.0


def test_a_level_that_no_rate_keeps_says_what_it_got() -> None:
    with pytest.raises(CapacityError, match=r"still broken \(ttft_s 0\.7\)"):
        max_rate(lambda rate: {"is_met": False, "ttft_s": 0.7}, 1.0)


def test_replicas_and_users() -> None:
    assert replicas_for(10, 2.5) == 4
    assert replicas_for(10.01, 2.5, spare=1) == 6
    assert users(12.0, 1 / 60) == 720
    with pytest.raises(CapacityError, match="requests_per_user_per_s"):
        users(1, 0)


def test_a_year_of_growth() -> None:
    """10 /s growing 10 % a month over 12 months: 28.53 /s in the last, 12 replicas of 2.5 /s."""
    plan = growth(10, 2.5, 16, 2.0, months=12, monthly=0.1)
    assert plan[0].replicas == 4
    assert plan[-1].requests_per_s == pytest.approx(10 * 1.1**11)
    assert plan[-1].replicas == math.ceil(10 * 1.1**11 / 2.5)
    assert plan[0].usd == pytest.approx(4 * 16 * 2.0 * 730.5)


def test_a_diurnal_day() -> None:
    """Amplitude 0 saves nothing; many small replicas approach the mean over the peak: 1 / (1 + amplitude)."""
    flat = diurnal_day(10, 0.0, 2.5, 16, 2.0)
    assert set(flat.replicas) == {4}
    assert flat.saved == 0
    fine = diurnal_day(10, 0.5, 0.001, 1, 2.0, slots=960)
    assert fine.gpu_hours == pytest.approx(24 * 10000, rel=0.005)
    assert fine.saved == pytest.approx(1 - 1 / 1.5, abs=0.005)
    assert fine.peak_replicas == 15000
    slow = diurnal_day(10, 0.5, 0.1, 1, 2.0, start_s=3600)
    quick = diurnal_day(10, 0.5, 0.1, 1, 2.0)
    assert slow.usd > quick.usd
    assert all(s >= q for s, q in zip(slow.replicas, quick.replicas, strict=True))


def test_a_spare_replica_makes_loss_rare() -> None:
    """Up 99 % of the time: 4 of 4 fail with 1 - 0.99^4; 4 of 5 need two down."""
    up = {"failures_per_replica_hour": 1 / 99, "repair_h": 1.0}
    assert loss_probability(4, 4, **up) == pytest.approx(1 - 0.99**4)
    assert loss_probability(5, 4, **up) == pytest.approx(1 - 0.99**5 - 5 * 0.01 * 0.99**4)
