"""Capacity under traffic: fleets screened by a fluid model, the survivors served request by request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.capacity.answer import CapacityResult, Survivor
from longcat_sim.capacity.candidates import Rejected, search_of, shapes
from longcat_sim.capacity.fleet import max_rate
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.price import MILLION
from longcat_sim.capacity.screen import OBJECTIVES, check_reachable, pareto, tpot_limit_s
from longcat_sim.capacity.screen_serving import ScreenedFleets, screen_fleets
from longcat_sim.capacity.search import kendall
from longcat_sim.capacity.sweep import Progress, sweep
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.errors import CapacityError
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.simulate import simulate_serving
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import StepFunction, engine, kv_link, pools_of

MOST_REQUESTS = 4000
"""Requests that one candidate serves: enough for a 99th percentile, few enough for fifty candidates."""
FRONT = {"usd_per_million_output_tokens": 1, "tpot_s": 1, "ttft_s": 1}
_engines: dict[Any, Engine] = {}


def engine_of(scenario: Scenario, draw: int = 0, role: str = "shared") -> Engine:
    """Return a replica's engine; the same object for the same deployment, scheduler and draw of the calibration."""
    assert scenario.serve is not None
    times = op_times_of(scenario.hardware)
    key = (
        scenario.model.model_dump_json(), id(times), draw, scenario.deployment.model_dump_json(),
        scenario.routing.model_dump_json(), scenario.speculative, scenario.serve.scheduler.model_dump_json(),
        role,
    )  # fmt: skip
    if key not in _engines:
        if len(_engines) >= 256:
            _engines.clear()
        _engines[key] = engine(scenario, times.draw(draw) if draw else times, scenario.serve, role)
    return _engines[key]


def simulate_fleet(scenario: Scenario, *, draw: int = 0, most_requests: int = MOST_REQUESTS) -> dict[str, Any]:
    """Return the figures of a fleet that serves the first ``most_requests`` of its traffic, a quarter of them to warm
    up at most.

    ``draw`` picks a draw of the calibration and a seed of the traffic; 0 is the fit and the scenario's seed. The price
    is the whole fleet's, each pool at its own device's price, over the output tokens.
    """
    serve = scenario.serve
    assert serve is not None
    arrivals, asked = serve.workload.arrivals, serve.workload.num_requests
    changes: dict[str, Any] = {"serve.workload.num_requests": min(most_requests, asked) if asked else most_requests}
    if arrivals is not None and arrivals.rate is not None:
        quarter_s = changes["serve.workload.num_requests"] / arrivals.rate / 4
        changes["serve.workload.warm_up"] = ParsedFloat(max(min(serve.workload.warm_up, quarter_s), quarter_s / 2))
    short = scenario.what_if(changes)
    assert short.serve is not None
    pools = pools_of(short, short.serve)
    engines = {name: engine_of(part, draw, name) for name, part in pools.items()}
    run = simulate_serving(
        short.serve, engines if short.serve.is_disaggregated else engines["shared"],
        kv_link=kv_link(short, short.serve),
        acceptance=scenario.speculative.acceptance, seed=scenario.seed + draw,
    )  # fmt: skip
    got = run.metrics()
    hours = got["gpu_hours_by_pool"]
    # steady state: tokens per second while requests came, not while the last ones were drained
    gpus = sum(_size(short, name) * pools[name].deployment.num_gpus for name in pools)
    usd_per_s = sum(
        _size(short, name) * part.deployment.num_gpus * part.usd_per_gpu_hour for name, part in pools.items()
    ) / 3600.0  # fmt: skip
    columns = run.records
    arrived = columns.numpy("arrival")
    counted = arrived >= round(short.serve.workload.warm_up * 1e9)
    span = max(float(arrived[counted].max() - arrived[counted].min()) * 1e-9, 1e-9) if counted.any() else 1e-9
    asked_tokens = float(columns.numpy("output")[counted].sum())
    attained = [level["attained_ratio"] for level in got["slo"].values() if level["attained_ratio"] is not None]
    if short.serve.autoscaler is not None:
        usd_per_s = sum(hours[name] * part.usd_per_gpu_hour for name, part in pools.items()) / max(run.duration_s, 1e-9)
    summary = {name: (got[name] or {}) for name in ("ttft_s", "tpot_s")}
    complete = got["completed"] / max(1, got["requests"])
    return {
        "usd_per_million_output_tokens": usd_per_s * span / max(asked_tokens, 1.0) * MILLION,
        "tpot_s": summary["tpot_s"].get("mean"), "tpot_p99_s": summary["tpot_s"].get("p99"),
        "ttft_s": summary["ttft_s"].get("mean"), "ttft_p99_s": summary["ttft_s"].get("p99"),
        "tokens_per_s_per_user": 1 / summary["tpot_s"]["mean"] if summary["tpot_s"].get("mean") else None,
        "attained": min(attained, default=0.0) * complete, "completed_ratio": complete, "num_gpus": float(gpus),
        "unstable": bool(got["unstable"]), "extrapolated": bool(got["extrapolated"]),
        "requests_per_s": float(counted.sum()) / span,
    }  # fmt: skip


def _size(scenario: Scenario, pool: str) -> int:
    serve = scenario.serve
    assert serve is not None
    one = {"prefill": serve.prefill, "decode": serve.decode}.get(pool)
    return one.replicas if one is not None else serve.replicas


def is_met(figures: Mapping[str, Any], scenario: Scenario) -> bool:
    """Whether a run kept the service level: enough requests of the worst class within it, and a stable queue."""
    return not figures["unstable"] and figures["attained"] >= search_of(scenario).attainment


def assess_fleet(scenario: Scenario, executor: Executor | None = None) -> dict[str, float]:
    """Return a fleet's figures over the scenario's draws of calibration and traffic, and the chance of its level."""
    draws = range(1, scenario.draws + 1) if scenario.draws > 1 else (0,)
    one = partial(_drawn, scenario)
    rows = list(executor.map(one, draws) if executor is not None else map(one, draws))
    figures: dict[str, float] = {}
    for name in ("usd_per_million_output_tokens", "tpot_s", "ttft_s", "attained"):
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
            figures |= {name: float(middle), f"{name}_p5": float(low), f"{name}_p95": float(high)}
    met = sum(is_met(row, scenario) for row in rows)
    figures["probability"] = (met + 0.5) / (len(rows) + 1)
    return figures


def _drawn(scenario: Scenario, draw: int) -> dict[str, Any]:
    return simulate_fleet(scenario, draw=draw)


def highest_rate(scenario: Scenario, *, rtol: float = 0.05) -> dict[str, Any]:
    """Return the highest rate of the scenario's traffic that its fleet serves within the level, and what binds there.

    Raises:
        CapacityError: no rate keeps it, or the workload has none.
    """
    rate = Traffic.of(scenario).requests_per_s
    is_trace = scenario.serve is not None and scenario.serve.workload.trace is not None
    scale = scenario.serve.workload.time_scale if scenario.serve is not None else 1.0

    def run(at: float) -> dict[str, Any]:
        key = "serve.workload.time_scale" if is_trace else "serve.workload.arrivals.rate"
        value = scale * at / rate if is_trace else ParsedFloat(at)
        figures = simulate_fleet(scenario.what_if({key: value}), most_requests=2000)
        return {**figures, "is_met": is_met(figures, scenario)}

    found = max_rate(run, rate, rtol=rtol)
    above = found.above or {}
    ttft, tpot = tpot_and_ttft_limits(scenario)
    breaks = [
        name
        for name, value, limit in (("ttft", above.get("ttft_p99_s"), ttft), ("tpot", above.get("tpot_p99_s"), tpot))
        if value is not None and limit is not None and value > limit
    ]  # fmt: skip
    return {
        "requests_per_s": found.requests_per_s, "broken_at_requests_per_s": found.above_requests_per_s,
        "broken_by": "an unstable queue" if above.get("unstable") else " and ".join(breaks) or "its level",
        "attained": found.at_rate["attained"], "runs": found.runs,
    }  # fmt: skip


def tpot_and_ttft_limits(scenario: Scenario) -> tuple[float | None, float | None]:
    """Return the strictest TTFT and TPOT of the classes."""
    assert scenario.serve is not None
    ttft = [level.ttft for level in scenario.serve.slo if level.ttft is not None]
    tpot = [level.tpot for level in scenario.serve.slo if level.tpot is not None]
    return min(ttft, default=None), min(tpot, default=None)


def _step_function(scenario: Scenario) -> StepFunction:
    return StepFunction(scenario, op_times_of(scenario.hardware))


def serving_capacity(
    scenario: Scenario,
    executor: Executor | None = None,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> CapacityResult:
    """Return the fleet that serves the scenario's traffic best within its level, and the highest rate it takes.

    Raises:
        CapacityError: nothing fits, carries the traffic or keeps the level; says what is closest.
    """
    search = search_of(scenario)
    ttft, tpot = tpot_and_ttft_limits(scenario)
    check_reachable(scenario, shapes(scenario)[0], tpot_limit_s(scenario))
    screened = screen_fleets(scenario, _step_function)
    values = screened.columns[search.objective] * OBJECTIVES[search.objective]
    within = np.ones(len(values), dtype=bool)
    for name, limit in (("ttft_s", ttft), ("tpot_s", tpot)):
        if limit is not None:
            within &= screened.columns[name] <= limit * 1.2  # a fluid model: near misses are simulated too
    if not within.any():
        raise _closest(screened, scenario, ttft, tpot)
    front = pareto(screened.columns, FRONT, within)
    ranked = [int(i) for i in np.flatnonzero(within)[np.argsort(values[within], kind="stable")]]
    chosen = list(dict.fromkeys([*ranked[: search.survivors // 2], *front, *ranked]))[: search.survivors]
    began = time.perf_counter()
    cases = [scenario.what_if(screened.changes[i]) for i in chosen]
    points = sweep(cases, simulate_fleet, executor, store=store, progress=progress)
    rows = [Survivor(i, screened.row(i), p.figures, p.faults) for i, p in zip(chosen, points, strict=True)]
    winner = _choose(rows, scenario, executor)
    best = scenario.what_if(screened.changes[winner.at])
    rate = highest_rate(best)
    rate |= _fleet(best, search.spare_replicas)
    spent = time.perf_counter() - began
    rejected = Rejected()
    rejected.merge(screened.rejected)
    rejected.add("service level", count=int((~within).sum()))
    binding = {
        "constraint": rate["broken_by"], "resource": rate["broken_by"],
        "sentence": f"{rate['broken_by']} beyond {rate['requests_per_s']:.3g} requests/s",
    }  # fmt: skip
    good = [row for row in rows if row.figures is not None]
    shown = pareto({n: np.array([row.figure(n) for row in good]) for n in FRONT}, FRONT)
    notes = ["screening ignores prefix hits between sessions; the simulation has them"]
    return CapacityResult(
        scenario, winner, rows, [good[i].to_json() for i in shown], binding, _why(screened, winner, scenario, within),
        dict(rejected.counts), rate, screened.looked_at, len(values), screened.wall_s, spent, 0.0,
        kendall(rows, search.objective), notes,
    )  # fmt: skip


def _fleet(scenario: Scenario, spare: int) -> dict[str, Any]:
    assert scenario.serve is not None
    pools = pools_of(scenario, scenario.serve)
    gpus = sum(_size(scenario, name) * part.deployment.num_gpus for name, part in pools.items())
    traffic = Traffic.of(scenario)
    return {
        "output_tokens_per_s": traffic.requests_per_s * traffic.output_tokens, "num_gpus": gpus,
        "replicas": sum(_size(scenario, name) for name in pools), "spare_replicas": spare, "concurrent_users": None,
    }  # fmt: skip


def _choose(rows: list[Survivor], scenario: Scenario, executor: Executor | None) -> Survivor:
    """Return the best simulated fleet that keeps the level with the probability asked for, assessed over all draws."""
    search = search_of(scenario)
    good = [row for row in rows if row.figures is not None]
    if not good:
        raise CapacityError(list(dict.fromkeys(fault for row in rows for fault in row.faults))[:10])
    ranked = sorted(good, key=lambda row: row.figure(search.objective) * OBJECTIVES[search.objective])
    kept = [row for row in ranked if is_met(row.figures or {}, scenario)]
    best: tuple[float, Survivor] | None = None
    for row in kept[:8]:
        assessed = assess_fleet(scenario.what_if(row.screened["changes"]), executor)
        row.figures = {**(row.figures or {}), **assessed}
        if assessed["probability"] >= search.probability:
            return row
        if best is None or assessed["probability"] > best[0]:
            best = (assessed["probability"], row)
    most = max(good, key=lambda row: (row.figures or {})["attained"]) if best is None else best[1]
    got = most.figures or {}
    raise CapacityError(
        f"{scenario.where}: serve.slo: expected a fleet of at most {search.max_gpus} GPUs that serves "
        f"{search.attainment:.0%} of the requests of each class within its level, with probability "
        f"{search.probability}; the closest of {len(good)} simulated is {most.screened['deployment']}: "
        f"{got['attained']:.1%} within it, TTFT {got['ttft_s']:.3g} s, TPOT {got['tpot_s'] * 1e3:.4g} ms"
        + (f", probability {best[0]:.2f}" if best else "")
        + "; loosen the level, allow more GPUs, or search other deployments"
    )


def _closest(screened: ScreenedFleets, scenario: Scenario, ttft: float | None, tpot: float | None) -> CapacityError:
    over = np.ones(len(screened.labels))
    for name, limit in (("ttft_s", ttft), ("tpot_s", tpot)):
        if limit is not None:
            over = np.maximum(over, screened.columns[name] / limit)
    row = screened.row(int(np.argmin(over)))
    fails = " and ".join(
        f"{name} {row[name]:.4g} s of {limit:.4g} s"
        for name, limit in (("ttft_s", ttft), ("tpot_s", tpot))
        if limit is not None and row[name] > limit
    )
    return CapacityError(
        f"{scenario.where}: serve.slo: expected a fleet that keeps its level; the closest of {len(over)} is "
        f"{row['deployment']}: {fails}; loosen the level, allow more GPUs, or search other deployments"
    )


def _why(screened: ScreenedFleets, winner: Survivor, scenario: Scenario, within: Any) -> list[dict[str, Any]]:
    """Return, for each change of the winner, the best fleet that chose otherwise and how much worse it is."""
    objective = search_of(scenario).objective
    values = screened.columns[objective] * OBJECTIVES[objective]
    rows = []
    for name, value in screened.changes[winner.at].items():
        others = np.array([changes.get(name) != value for changes in screened.changes]) & within
        if others.any():
            at = int(np.flatnonzero(others)[np.argmin(values[others])])
            rows.append(
                {
                    "choice": name.split(".", 1)[-1], "value": _short(screened.changes[at].get(name)),
                    "instead_of": _short(value), "deployment": screened.labels[at], "objective": objective,
                    "ratio": float(screened.columns[objective][at] / screened.columns[objective][winner.at]),
                }
            )  # fmt: skip
    return rows


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return str(value)
