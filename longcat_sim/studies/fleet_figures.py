"""A fleet's figures under traffic: one short run, its spread over draws, its service level, and its highest rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.fleet import Rate, max_rate
from longcat_sim.capacity.price import MILLION, SECONDS_PER_HOUR
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.capacity.uncertainty import chance_of
from longcat_sim.errors import CapacityError
from longcat_sim.simulation.serving.request import COMPLETED
from longcat_sim.simulation.serving.simulate import ServingResult
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import pools_of
from longcat_sim.studies.served import serve_once

MOST_REQUESTS = 4000
"""Requests that one candidate serves, where a steady state does not take more: enough for a 99th percentile."""
FILL, WINDOW = 3.0, 1.5
"""Mean stays that fill a fleet (to 95 %, of exponential lengths) and that are counted then. Assumed."""
LENGTHENED = 4
"""Times that traffic is lengthened before its fleet is taken for one whose queue grows."""
RATE_REQUESTS = 2000
LONG_REQUESTS = 16_000
"""Requests in which a verdict must still hold: near its highest rate a queue fills for far longer than a request stays,
and 2,000 see little of it (``test_headroom_lasts``). Assumed."""
FULL, TIMES_LONGER = 0.9, 5
"""Share of the places of a replica's batch, on average, beyond which 16,000 requests are too few, and how many times as
many tell: at 95 requests/s one decode replica of 32 H800 filled 2,041 of its 2,048 places and kept its level in 16,000
requests, and for the queue behind them missed it in 80,000 (``test_a_decode_pool_that_only_just_holds_its_sequences``).
Assumed."""
MOST_RATE_DRAWS = 8
"""Draws in which the highest rate is sought anew: each takes about five runs."""
RATE_STEP = 1.25
BATCHES, SURE = 10, 3.0
"""Parts of a run that tell how exact its share within the level is, and the standard errors from the level that leave
no doubt. Requests that queue together are late together, which the parts' spread shows in part only: over 4 seeds of
short runs of a LongCat-Flash fleet at its level the share spreads by 0.008, where the parts say 0.006 to 0.009, and
the parts of a long run by 0.010 to 0.013. Source: batch means, Law, Simulation Modeling and Analysis, section 9.5.3."""
SPREAD = (
    "usd_per_million_output_tokens", "usd_per_million_output_tokens_all_in", "usd_per_million_input_tokens",
    "usd_per_million_cached_input_tokens", "tpot_s", "tpot_p99_s", "ttft_s", "ttft_p99_s", "attained",
)  # fmt: skip


def fleet_size(scenario: Scenario, pool: str) -> int:
    """Return the replicas of a pool."""
    serve = scenario.serve
    assert serve is not None
    one = {"prefill": serve.prefill, "decode": serve.decode}.get(pool)
    return one.replicas if one is not None else serve.replicas


def _length(scenario: Scenario, most_requests: int, stay_s: float, times_long: int) -> Scenario:
    """Return the scenario with as much of its traffic as one run needs.

    A fleet is judged when it holds as many requests as it will hold for ever: synthetic traffic lasts ``FILL`` mean
    stays to fill it, which are not counted, and ``WINDOW`` more. Until a stay is known (0), and of a trace, it is the
    first ``most_requests``, of which an eighth or more are to warm up, and a quarter at most. A long run has
    ``LONG_REQUESTS`` of synthetic traffic, whatever was asked for.
    """
    serve = scenario.serve
    assert serve is not None
    workload = serve.workload
    asked, rate = workload.num_requests, workload.arrivals.rate if workload.arrivals is not None else None
    if asked is None and rate is not None and workload.duration is not None and not workload.sessions:
        asked = int(rate * workload.duration) + 1
    requests = min(asked or most_requests, most_requests)
    if times_long and rate is not None:  # of sessions, each with several requests, as many fewer
        requests = max(1, round(times_long * LONG_REQUESTS * rate / Traffic.of(scenario).requests_per_s))
    if asked == requests and (
        rate is None
        or (not stay_s and workload.warm_up < 0.75 * requests / rate)
        or (stay_s and FILL * stay_s <= workload.warm_up <= requests / rate - WINDOW * stay_s)
    ):
        return scenario
    if rate is None:
        return scenario.what_if({"serve.workload.num_requests": requests})
    if not stay_s:
        quarter_s = requests / rate / 4
        warm_up_s = max(min(workload.warm_up, quarter_s), quarter_s / 2)
    else:
        requests = max(requests, math.ceil((FILL + WINDOW) * stay_s * rate))
        warm_up_s = FILL / (FILL + WINDOW) * requests / rate
    changes = {"num_requests": requests, "duration": None, "warm_up": ParsedFloat(warm_up_s)}
    return scenario.what_if({f"serve.workload.{name}": value for name, value in changes.items()})


def _steady_run(
    scenario: Scenario, draw: int, most_requests: int, stay_s: float, is_priced: bool, times_long: int
) -> tuple[ServingResult, dict[str, Any], float]:
    """Return a run that is long enough for its own requests' stay, its figures, and that stay in seconds.

    Traffic is lengthened until it is, but not where the level is missed already, for a fuller fleet is slower. Where
    requests stay the longer, the longer the traffic lasts, the queue grows without bound.
    """
    for left in reversed(range(LENGTHENED + 1)):
        short = _length(scenario, most_requests, stay_s, times_long)
        run, got = serve_once(short, draw, is_priced=is_priced)
        arrivals, window = run.serve.workload.arrivals, got["window_s"]
        found = max((got[name] or {"mean": 0.0})["mean"] for name in ("e2e_s", "session_s"))
        is_full = window[0] >= FILL * found and window[1] - window[0] >= WINDOW * found
        is_near = 0.8 * found <= stay_s
        is_late = scenario.search is not None and _attained(got) < scenario.search.attainment
        if arrivals is None or arrivals.rate is None or got["unstable"] or is_late or is_near or is_full:
            break
        if not left:
            got["unstable"] = True
        stay_s = found
    return run, got, max(stay_s, found)


def _attained(got: Mapping[str, Any]) -> float:
    """Return the share of the requests of the worst class that completed within their level."""
    attained = [level["attained_ratio"] for level in got["slo"].values() if level["attained_ratio"] is not None]
    return min(attained, default=0.0)


def simulate_fleet(
    scenario: Scenario,
    *,
    draw: int = 0,
    most_requests: int = MOST_REQUESTS,
    is_priced: bool = True,
    stay_s: float = 0.0,
    times_long: int = 0,
) -> dict[str, Any]:
    """Return the figures of a fleet in the steady state of its traffic, or over the first ``most_requests`` of a trace
    (``times_long`` times ``LONG_REQUESTS`` in a long run; a fleet that keeps its level with full batches gets more).

    ``draw`` 0 is the fit and the scenario's seed, another a draw of calibration, traffic and model error. ``stay_s`` is
    how long a request stays, where an earlier run told (``stay_s`` of its figures). Prices are as ``simulate`` prints.
    """
    most_requests = times_long * LONG_REQUESTS or most_requests
    run, got, stay_s = _steady_run(scenario, draw, most_requests, stay_s, is_priced, times_long)
    if times_long == 1 and scenario.search is not None and _attained(got) >= scenario.search.attainment:
        is_full = got["decode_sequences_per_replica"] > FULL * run.serve.scheduler.max_num_seqs
        is_whole = run.serve.workload.trace is not None and len(run.records) < most_requests  # a trace has no more
        if is_full and not is_whole and not got["unstable"]:
            run, got, stay_s = _steady_run(
                scenario, draw, TIMES_LONGER * most_requests, stay_s, is_priced, TIMES_LONGER
            )
    mean = {name: (got[name] or {}) for name in ("ttft_s", "tpot_s", "e2e_s")}
    complete = got["completed"] / max(1, got["requests"])
    whole = got.get("usd_per_million_output_tokens_all_in")
    paid = {"usd_per_hour": whole * got["output_tokens_per_s"] * SECONDS_PER_HOUR / MILLION} if whole else {}
    tpot = mean["tpot_s"].get("mean")
    pools = pools_of(scenario, scenario.serve)  # type: ignore[arg-type]
    return {
        **{name: got[name] for name in got if name.startswith("usd_per_million")}, **paid,
        "tpot_s": tpot, "tpot_p99_s": mean["tpot_s"].get("p99"), "ttft_s": mean["ttft_s"].get("mean"),
        "ttft_p99_s": mean["ttft_s"].get("p99"), "e2e_s": mean["e2e_s"].get("mean"),
        "tokens_per_s_per_user": 1 / tpot if tpot else None, "attained": _attained(got),
        "completed_ratio": complete, **_missed(run), "unstable": bool(got["unstable"]),
        "num_gpus": float(sum(fleet_size(scenario, name) * part.deployment.num_gpus for name, part in pools.items())),
        "extrapolated": bool(got["extrapolated"]), "preemptions": float(got["preemptions"]),
        "decode_sequences_per_replica": got["decode_sequences_per_replica"], "stay_s": stay_s,
        "requests": float(len(run.records)), "counted_requests": float(got["requests"]),
    }  # fmt: skip


def _missed(run: ServingResult) -> dict[str, float]:
    """Return the largest share over classes of counted requests that came too late, by part of the level, and the
    largest standard error of the share within all of it."""
    columns = run.records
    arrival, first, last = (columns.numpy(name) for name in ("arrival", "first", "last"))
    outputs, of_class = columns.numpy("output"), columns.numpy("slo_class")
    counted, completed = arrival >= round(run.serve.workload.warm_up * 1e9), columns.numpy("status") == COMPLETED
    missed = {"missed_ttft": 0.0, "missed_tpot": 0.0, "missed_e2e": 0.0, "attained_error": 0.0}
    for at, level in enumerate(run.serve.slo):
        mine = counted & (of_class == at)
        met, done = completed[mine], mine & completed
        for name, limit, late in (
            ("missed_ttft", level.ttft, first - arrival), ("missed_e2e", level.e2e, last - arrival),
            ("missed_tpot", level.tpot, (last - first) / np.maximum(outputs - 1, 1)),
        ):  # fmt: skip
            if limit is not None and done.any():
                met &= late[mine] <= limit * 1e9
                missed[name] = max(missed[name], float((late[done] > limit * 1e9).mean()))
        missed["attained_error"] = max(missed["attained_error"], _error_of(met))
    return missed


def _error_of(met: npt.NDArray[np.bool_]) -> float:
    """Return the standard error of a share from the requests that count, in order of arrival: from the means of
    ``BATCHES`` parts, and no less than that of as many independent ones."""
    if len(met) < 2:
        return 1.0
    share, parts = float(met.mean()), [part.mean() for part in np.array_split(met, min(BATCHES, len(met)))]
    return max(math.sqrt(share * (1 - share) / len(met)), float(np.std(parts)) / math.sqrt(len(parts) - 1))


def is_met(figures: Mapping[str, Any], scenario: Scenario) -> bool:
    """Whether a run kept the service level: enough requests of the worst class within it, and a stable queue."""
    return not figures["unstable"] and figures["attained"] >= search_of(scenario).attainment


def doubt(figures: Mapping[str, Any]) -> float:
    """Return how far off a short run's share within the level may be."""
    return SURE * float(figures["attained_error"])


def could_meet(figures: Mapping[str, Any], scenario: Scenario) -> bool:
    """Whether a longer run than this one may keep the service level."""
    return bool(figures["attained"] + doubt(figures) >= search_of(scenario).attainment)


def lasting(scenario: Scenario, figures: Mapping[str, Any], draw: int = 0) -> dict[str, Any]:
    """Return the figures of a short run, priced as ``simulate`` prints them, with the service of a long one."""
    return {
        **figures,
        **simulate_fleet(scenario, draw=draw, stay_s=figures["stay_s"], times_long=1, is_priced=False),
    }


def _drawn(scenario: Scenario, stay_s: float, draw: int) -> dict[str, Any]:
    return lasting(scenario, simulate_fleet(scenario, draw=draw, stay_s=stay_s), draw)


def spread_of(
    centre: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], names: Iterable[str] = SPREAD
) -> dict[str, float]:
    """Return ``name_p5`` and ``name_p95`` of each figure over draws; those that some draw lacks are left out.

    An interval holds the centre: of a few draws, all may lie on one side of it.
    """
    rows = list(rows)
    figures: dict[str, float] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if rows and len(values) == len(rows) and centre.get(name) is not None:
            low, high = np.quantile(values, (0.05, 0.95))
            figures |= {f"{name}_p5": min(float(low), centre[name]), f"{name}_p95": max(float(high), centre[name])}
    return figures


def assess_fleet(
    scenario: Scenario, executor: Executor | None = None, *, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a fleet's figures with intervals over the scenario's draws, and the chance of its level.

    Service is judged in long runs; ``known`` are the ``lasting`` figures of draw 0, if a search has them. With one draw
    there is a point and neither interval nor chance: ``probability`` is None.
    """
    figures = dict(known) if known is not None else lasting(scenario, simulate_fleet(scenario))
    if scenario.draws == 1:
        return {**figures, "probability": None}
    draws = range(1, scenario.draws + 1)
    one = partial(_drawn, scenario, figures["stay_s"])
    rows = list(executor.map(one, draws) if executor is not None else map(one, draws))
    met = sum(is_met(row, scenario) for row in rows)
    return {**figures, **spread_of(figures, rows), "probability": chance_of(met, len(rows))}


def _rate_in_draw(scenario: Scenario, rtol: float, start: float, stay_s: float, draw: int, times_long: int = 0) -> Rate:
    """Return the highest rate in one draw, judged in short runs or in long ones; ``start`` is near it."""
    serve = scenario.serve
    assert serve is not None
    rate = Traffic.of(scenario).requests_per_s
    is_trace = serve.workload.trace is not None

    def run(at: float) -> dict[str, Any]:
        nonlocal stay_s
        key = "serve.workload.time_scale" if is_trace else "serve.workload.arrivals.rate"
        now = serve.workload.time_scale if is_trace else serve.workload.arrivals.rate  # type: ignore[union-attr]
        of = scenario.what_if({key: now * at / rate if is_trace else ParsedFloat(now * at / rate)})  # type: ignore[operator]
        figures = simulate_fleet(
            of, draw=draw, most_requests=RATE_REQUESTS, is_priced=False, stay_s=stay_s, times_long=times_long
        )
        kept = is_met(figures, scenario)
        if kept:
            stay_s = figures["stay_s"]
        return {**figures, "is_met": kept}

    return max_rate(run, start, rtol=rtol, factor=RATE_STEP)


def highest_rate(
    scenario: Scenario, executor: Executor | None = None, *, rtol: float = 0.05, stay_s: float = 0.0
) -> dict[str, Any]:  # fmt: skip
    """Return the highest rate of the scenario's traffic that its fleet serves within the level, its interval over
    draws, and what breaks just above it.

    It is sought in short runs, then in long ones; what draws do to it, in short ones. Of a trace, whose beginning says
    little of the rest, all runs are long.

    Raises:
        CapacityError: no rate keeps it, or the workload has none.
    """
    assert scenario.serve is not None
    is_trace, own = scenario.serve.workload.trace is not None, Traffic.of(scenario).requests_per_s
    short = None if is_trace else _rate_in_draw(scenario, rtol, own, stay_s, 0)
    start, stay_s = (own, stay_s) if short is None else (short.requests_per_s, short.at_rate["stay_s"])
    found = _rate_in_draw(scenario, rtol, start, stay_s, 0, times_long=1)
    near = found.requests_per_s if short is None else short.requests_per_s
    lasting = found.requests_per_s / near
    interval: dict[str, float] = {}
    if scenario.draws > 1:
        one = partial(_rate_or_none, scenario, 2 * rtol, near, stay_s, int(is_trace))
        draws = range(1, min(scenario.draws, MOST_RATE_DRAWS) + 1)
        rates = list(executor.map(one, draws) if executor is not None else map(one, draws))
        centre = {"requests_per_s": found.requests_per_s}
        interval = spread_of(centre, [{"requests_per_s": lasting * (rate or 0.0)} for rate in rates], centre)
    above = found.above or {}
    allowed = 1 - search_of(scenario).attainment
    late = {name: above.get(f"missed_{name}", 0.0) for name in ("ttft", "tpot", "e2e")}
    worst = max(late, key=lambda name: late[name])
    if not above:
        broken, said = "nothing", "no rate that was tried breaks it"
    elif above["unstable"]:
        broken, said = "an unstable queue", "the queue grows without bound"
    elif late[worst] > 1 - above["completed_ratio"]:
        broken = worst
        said = f"{late[worst]:.1%} of the requests of a class exceed its {worst.upper()} ({allowed:.1%} may)"
        if late[worst] <= allowed:  # no part alone breaks it
            parts = ", ".join(f"{share:.1%} its {name.upper()}" for name, share in late.items() if share)
            said = f"{1 - above['attained']:.1%} of the requests of a class miss its level ({parts}; {allowed:.1%} may)"
    else:
        broken, said = "rejected requests", f"{1 - above['completed_ratio']:.0%} of the requests are not completed"
    at = found.at_rate
    return {
        "requests_per_s": found.requests_per_s, **interval, "broken_at_requests_per_s": found.above_requests_per_s,
        "broken_by": broken, "broken_how": said, "attained": at["attained"],
        "runs": found.runs + (short.runs if short else 0),
        "concurrent_users": found.requests_per_s * at["e2e_s"],
        "decode_sequences_per_replica": at["decode_sequences_per_replica"],
        "preemptions_above": above.get("preemptions", 0.0),
    }  # fmt: skip


def _rate_or_none(
    scenario: Scenario, rtol: float, start: float, stay_s: float, times_long: int, draw: int
) -> float | None:
    """Return a draw's highest rate; None where none keeps the level."""
    try:
        return _rate_in_draw(scenario, rtol, start, stay_s, draw, times_long).requests_per_s
    except CapacityError:
        return None


def ttft_and_tpot_limits(scenario: Scenario) -> tuple[float | None, float | None]:
    """Return the strictest TTFT and TPOT of the classes."""
    assert scenario.serve is not None
    ttft = [level.ttft for level in scenario.serve.slo if level.ttft is not None]
    tpot = [level.tpot for level in scenario.serve.slo if level.tpot is not None]
    return min(ttft, default=None), min(tpot, default=None)
