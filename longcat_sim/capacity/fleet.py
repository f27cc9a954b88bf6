"""From one replica's rate to a fleet: users, spares, growth, and a day whose load rises and falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from longcat_sim.errors import CapacityError
from longcat_sim.specs.price import HOURS_PER_MONTH

Verdict = Mapping[str, Any]
"""What a run at some rate gave; ``is_met`` says whether it kept the service level."""
SHOWN = ("attained", "ttft_p99_s", "tpot_p99_s", "ttft_s", "tpot_s")
"""Figures of a verdict that a message quotes."""


@dataclass(frozen=True)
class Rate:
    """Highest arrival rate that keeps the service level, and what the run at that rate gave."""

    requests_per_s: float
    at_rate: Verdict
    above_requests_per_s: float | None
    """The lowest rate tried that broke it; None if none did."""
    above: Verdict | None
    runs: int


def max_rate(
    run: Callable[[float], Verdict], start: float, *, rtol: float = 0.02, highest: float = math.inf, max_runs: int = 40,
    factor: float = 2.0,
) -> Rate:  # fmt: skip
    """Return the highest rate at which ``run(rate)["is_met"]``, to a relative ``rtol``.

    The rate grows (or shrinks) by ``factor`` from ``start`` until it is bracketed, then the bracket is cut in its
    geometric middle.
    With the same traffic seed in every run, a higher rate is the same requests closer together.

    Raises:
        CapacityError: not even a thousandth of ``start`` meets it; says what the run gave.
    """
    if not start > 0:
        raise CapacityError(f"start: expected a rate above 0 /s, such as 1.0; got {start!r}; mend it")
    good: tuple[float, Verdict] | None = None
    bad: tuple[float, Verdict] | None = None
    rate, runs = min(start, highest), 0
    while runs < max_runs:
        verdict = run(rate)
        runs += 1
        if verdict["is_met"]:
            good = (rate, verdict)
            if rate >= highest:
                break
        else:
            bad = (rate, verdict)
        if good and bad:
            if bad[0] / good[0] <= 1 + rtol:
                break
            rate = math.sqrt(good[0] * bad[0])
        elif good:
            rate = min(rate * factor, highest)
        else:
            rate /= factor
            if rate < start / 1000:
                shown = ", ".join(f"{name} {verdict[name]:.4g}" for name in SHOWN if verdict.get(name) is not None)
                raise CapacityError(
                    f"slo: expected a level that some rate can keep; at {rate * factor:.3g} requests/s it is still "
                    f"broken ({shown}); loosen the level or choose a faster deployment"
                )
    if good is None:
        raise CapacityError(f"slo: expected a rate that keeps the level; none of {runs} down to {rate:.3g} /s did")
    return Rate(good[0], good[1], bad[0] if bad else None, bad[1] if bad else None, runs)


def users(requests_per_s: float, requests_per_user_per_s: float) -> int:
    """Return how many users a fleet serves, each sending at a mean rate.

    Raises:
        CapacityError: a rate that is not positive.
    """
    if not requests_per_user_per_s > 0:
        raise CapacityError(
            f"requests_per_user_per_s: expected more than 0, such as 1 / 60; got {requests_per_user_per_s!r}; mend it"
        )
    return int(requests_per_s / requests_per_user_per_s)


def replicas_for(requests_per_s: float, per_replica: float, *, spare: int = 0) -> int:
    """Return the replicas that carry a rate, and ``spare`` beyond them (1: N+1)."""
    return max(1, math.ceil(requests_per_s / per_replica - 1e-9)) + spare


@dataclass(frozen=True)
class Month:
    """One month of a plan."""

    month: int
    requests_per_s: float
    replicas: int
    num_gpus: int
    usd: float


def growth(
    requests_per_s: float, per_replica: float, gpus_per_replica: int, usd_per_gpu_hour: float, *, months: int,
    monthly: float, spare: int = 0,
) -> list[Month]:  # fmt: skip
    """Return the fleet of each month while the rate grows by the share ``monthly``; paid every hour.

    Raises:
        CapacityError: less than one month, or a shrinkage of everything.
    """
    if months < 1 or monthly <= -1:
        raise CapacityError(
            f"growth: expected months >= 1 and monthly > -1, such as 12 and 0.1; got {months} and {monthly}; mend them"
        )
    plan = []
    for month in range(1, months + 1):
        rate = requests_per_s * (1 + monthly) ** (month - 1)
        count = replicas_for(rate, per_replica, spare=spare)
        num_gpus = count * gpus_per_replica
        plan.append(Month(month, rate, count, num_gpus, num_gpus * usd_per_gpu_hour * HOURS_PER_MONTH))
    return plan


@dataclass(frozen=True)
class Day:
    """A day of a fleet: replicas by hour, GPU-hours, cost and what reserved GPUs would cost instead."""

    hours: tuple[float, ...]
    """Start of each slot, in hours."""
    requests_per_s: tuple[float, ...]
    replicas: tuple[int, ...]
    gpu_hours: float
    usd: float
    peak_replicas: int
    fixed_usd: float
    """With the peak's replicas up all day."""

    @property
    def saved(self) -> float:
        """Share of the fixed fleet's cost that scaling saves."""
        return 1 - self.usd / self.fixed_usd


def diurnal_day(
    mean_requests_per_s: float, amplitude: float, per_replica: float, gpus_per_replica: int, usd_per_gpu_hour: float, *,
    spare: int = 0, min_replicas: int = 1, start_s: float = 0.0, slots: int = 96, period_h: float = 24.0,
) -> Day:  # fmt: skip
    """Return a day under rate(t) = mean (1 + amplitude sin(2 pi t / period)), replicas following the load.

    A replica must be up ``start_s`` (its weights' load time) before it is needed, and is paid from then on, so each
    slot holds the most that any slot within ``start_s`` after it needs.

    Raises:
        CapacityError: an amplitude outside 0..1.
    """
    if not 0 <= amplitude <= 1:
        raise CapacityError(f"amplitude: expected a share in 0..1, such as 0.5; got {amplitude!r}; mend it")
    slot_h = period_h / slots
    edges = [at * slot_h for at in range(slots + 1)]

    def rate(hour: float) -> float:
        return mean_requests_per_s * (1 + amplitude * math.sin(2 * math.pi * hour / period_h))

    # the busiest moment of each slot: its ends, or the top of the sine inside it
    top = period_h / 4
    highest = [max(rate(a), rate(b), rate(top) if a <= top <= b else 0.0) for a, b in pairwise(edges)]
    needed = [max(min_replicas, replicas_for(r, per_replica, spare=spare)) for r in highest]
    ahead = math.ceil(start_s / 3600 / slot_h - 1e-9)
    held = [max(needed[(at + k) % slots] for k in range(ahead + 1)) for at in range(slots)]
    gpu_hours = sum(held) * slot_h * gpus_per_replica
    peak = max(held)
    return Day(
        tuple(edges[:-1]), tuple(highest), tuple(held), gpu_hours, gpu_hours * usd_per_gpu_hour, peak,
        peak * gpus_per_replica * period_h * usd_per_gpu_hour,
    )  # fmt: skip


def loss_probability(replicas: int, needed: int, failures_per_replica_hour: float, repair_h: float) -> float:
    """Return the share of time in which fewer than ``needed`` of ``replicas`` are up.

    Each fails and is repaired on its own: up with probability 1 / (1 + failures x repair time).

    Source: independent repairable units, binomial availability, e.g. Trivedi, Probability and Statistics, section 8.4.
    """
    up = 1 / (1 + failures_per_replica_hour * repair_h)
    return sum(math.comb(replicas, k) * up**k * (1 - up) ** (replicas - k) for k in range(min(needed, replicas + 1)))
