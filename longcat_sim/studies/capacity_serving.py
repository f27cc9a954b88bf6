"""Capacity under traffic: fleets screened by a fluid model, the survivors served request by request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.capacity.answer import CapacityResult, Survivor
from longcat_sim.capacity.candidates import Rejected, search_of, shapes
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.reasons import step_elasticities, time_goes_with
from longcat_sim.capacity.screen import check_reachable, objective_of, pareto, tpot_limit_s
from longcat_sim.capacity.screen_serving import ScreenedFleets, check_ttft_reachable, prompt_turns, screen_fleets
from longcat_sim.capacity.search import kendall
from longcat_sim.capacity.sweep import Progress, sweep
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.capacity.uncertainty import check_draws
from longcat_sim.errors import CapacityError
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import StepFunction, budget_notes, pools_of
from longcat_sim.studies.fleet_figures import (
    assess_fleet,
    fleet_size,
    highest_rate,
    is_met,
    is_met_for_long,
    simulate_fleet,
    ttft_and_tpot_limits,
)
from longcat_sim.studies.simulate import LEANING, leans_on

FRONT = {"usd_per_million_output_tokens_all_in": 1, "tpot_s": 1, "ttft_s": 1}
MOST_ASSESSED = 8
"""Leading fleets whose probability is found before the search gives up."""
MORE, MOST_SIMULATED = 4, 60
"""Fleets simulated at once beyond the survivors, while a cheaper one than the best may keep the level; and in all."""


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
    ttft, tpot = ttft_and_tpot_limits(scenario)
    if search.output_tokens_per_s is not None:
        raise CapacityError(
            f"{scenario.where}: search.output_tokens_per_s: expected none under traffic, which says what is asked for; "
            f"got {search.output_tokens_per_s:g}; set serve.workload.arrivals.rate instead"
        )
    if search.tpot is not None:
        raise CapacityError(
            f"{scenario.where}: search.tpot: expected none under traffic, where serve.slo holds the level; got "
            f"{search.tpot * 1e3:g} ms; set 'serve.slo=[{{name: default, tpot: {search.tpot * 1e3:g} ms}}]' instead"
        )
    check_draws(scenario.draws, search.probability, scenario.where)
    kept = shapes(scenario)[0]
    check_reachable(scenario, kept, tpot_limit_s(scenario))
    check_ttft_reachable(scenario, kept, ttft)
    screened = screen_fleets(scenario, _step_function)
    objective, sense = objective_of(scenario)
    values = screened.columns[objective] * sense
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
    rows: list[Survivor] = []
    while chosen:
        cases = [scenario.what_if(screened.changes[i]) for i in chosen]
        points = sweep(cases, simulate_fleet, executor, store=store, progress=progress)
        rows += [Survivor(i, screened.row(i), p.figures, p.faults) for i, p in zip(chosen, points, strict=True)]
        for row in rows[-len(chosen) :]:
            _check_for_long(row, scenario)
        chosen = _cheaper(rows, screened, [i for i in ranked if within[i]], values, scenario)
    winner = _choose(rows, scenario, executor)
    best = scenario.what_if(screened.changes[winner.at])
    # simulated and over the level, or better than the winner and ruled out by what was: no reason against the winner
    failed = values < values[winner.at]
    failed[[row.at for row in rows if row.figures is None or not is_met(row.figures, scenario)]] = True
    left = _without_spares(best, search.spare_replicas)
    rate = highest_rate(left, executor, stay_s=winner.figure("stay_s", 0.0))
    rate |= _fleet(best, search.spare_replicas)
    spent = time.perf_counter() - began
    rejected = Rejected()
    rejected.merge(screened.rejected)
    rejected.add("service level", count=int((~within).sum()))
    good = [row for row in rows if row.figures is not None]
    shown = pareto({n: np.array([row.figure(n) for row in good]) for n in FRONT}, FRONT)
    served = best.serve
    assert served is not None
    notes = budget_notes(pools_of(best, served), served)
    if search.sequences_per_gpu:
        notes.append("search.sequences_per_gpu has no effect under traffic, which makes its own batches")
    if served.workload.sessions is None and served.workload.trace is not None:
        notes.append("screening ignores prefix hits between requests of the trace; the simulation has them")
    share, said = leans_on(best, Traffic.of(best).decode_context)
    if share > LEANING:
        notes += [*said, f"{share:.0%} of the winner's op time was not measured on its hardware: its place may change"]
    if len(rows) >= MOST_SIMULATED:
        notes.append(f"{len(rows)} fleets were simulated, the most that are: a cheaper one may keep the level too")
    if scenario.draws == 1:
        notes.append("draws: 1 is a point estimate, without intervals or a probability; --set draws=16 gives both")
    reasons = _why(screened, winner, scenario, within & ~failed)
    return CapacityResult(
        scenario, winner, rows, [good[i].to_json() for i in shown], _binding(left, rate),
        reasons, dict(rejected.counts), rate, screened.looked_at, len(values),
        screened.wall_s, spent, 0.0, kendall(rows, objective), notes,
    )  # fmt: skip


def _without_spares(scenario: Scenario, spare: int) -> Scenario:
    """Return the fleet that has lost its spares: what it takes then is what it can be relied on for."""
    assert scenario.serve is not None
    if not spare:
        return scenario
    pools = pools_of(scenario, scenario.serve)
    paths = {name: "serve.replicas" if name == "shared" else f"serve.{name}.replicas" for name in pools}
    return scenario.what_if({path: fleet_size(scenario, name) - spare for name, path in paths.items()})


def _fleet(scenario: Scenario, spare: int) -> dict[str, Any]:
    assert scenario.serve is not None
    pools = pools_of(scenario, scenario.serve)
    gpus = sum(fleet_size(scenario, name) * part.deployment.num_gpus for name, part in pools.items())
    traffic = Traffic.of(scenario)
    return {
        "output_tokens_per_s": traffic.requests_per_s * traffic.output_tokens, "num_gpus": gpus,
        "replicas": sum(fleet_size(scenario, name) for name in pools), "spare_replicas": spare,
    }  # fmt: skip


def _binding(scenario: Scenario, rate: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ends the fleet's rate, and what the steps behind that go with."""
    serve = scenario.serve
    assert serve is not None
    pools, traffic = pools_of(scenario, serve), Traffic.of(scenario)
    is_prompt = rate["broken_by"] == "ttft"
    part = pools.get("prefill" if is_prompt else "decode", pools.get("shared"))
    assert part is not None
    batch = max(1.0, float(rate["mean_decode_batch"]))
    ranks = part.deployment.dp_size
    tokens = traffic.computed_tokens / prompt_turns(serve.scheduler, ranks, traffic.computed_tokens)
    keys = max(traffic.prompt_keys, (tokens + 1) / 2)
    prompt = (0.0, 0.0, tokens * ranks, keys, 1.0 / ranks)
    at = prompt if is_prompt else (batch, traffic.decode_context, 0.0, 0.0, 1.0)

    def step_s(of: Scenario, times: Any) -> float:
        return float(StepFunction(of, times)(*(np.array([value]) for value in at))[0])

    shares = step_elasticities(part, op_times_of, step_s)
    said = rate["broken_how"]
    if rate["preemptions_above"] > 0:
        said += "; KV memory is full there (requests are preempted)"
    elif batch > 0.9 * serve.scheduler.max_num_seqs and not is_prompt:
        said += f"; its batches are at serve.scheduler.max_num_seqs = {serve.scheduler.max_num_seqs}"
    beyond = rate["broken_at_requests_per_s"]
    where = f"at {beyond:.3g} requests/s " if beyond else ""
    return {
        "constraint": rate["broken_by"], "resource": max(shares, key=lambda name: shares[name], default=""),
        "step_time_shares": shares,
        "sentence": f"{where}{said}; a {'prompt' if is_prompt else 'decode'} step's time goes with "
        f"{time_goes_with(shares)}",
    }  # fmt: skip


def _check_for_long(row: Survivor, scenario: Scenario) -> None:
    """Take a fleet that keeps its level in a short run for one whose queue grows, if it does not in a long one."""
    if row.figures is not None and is_met(row.figures, scenario):
        fleet = scenario.what_if(row.screened["changes"])
        row.figures = {**row.figures, "unstable": not is_met_for_long(fleet, row.figures["stay_s"])}


def _cheaper(
    rows: list[Survivor], screened: ScreenedFleets, ranked: list[int], values: Any, scenario: Scenario
) -> list[int]:
    """Return the next fleets to simulate: better than the best so far, and screened as faster than those that failed.

    Without them the best of the survivors would be the answer, though the fluid model only ranks: the cheapest may
    fail, and the points of the front that do not are dear.
    """
    kept = [values[row.at] for row in rows if row.figures is not None and is_met(row.figures, scenario)]
    best = min(kept, default=np.inf)
    limits = dict.fromkeys(("ttft_s", "tpot_s", "load"), np.inf)
    for row in rows:
        if row.figures is None or is_met(row.figures, scenario):
            continue
        late = {f"{name}_s": row.figures[f"missed_{name}"] for name in ("ttft", "tpot")}
        broken = "load" if row.figures["unstable"] or not any(late.values()) else max(late, key=lambda name: late[name])
        limits[broken] = min(limits[broken], row.screened[broken])
    done = {row.at for row in rows}
    left = [
        i
        for i in ranked
        if i not in done
        and values[i] < best
        and all(screened.columns[name][i] < limit for name, limit in limits.items())
    ]
    return left[: min(MORE, MOST_SIMULATED - len(rows))]


def _choose(rows: list[Survivor], scenario: Scenario, executor: Executor | None) -> Survivor:
    """Return the best simulated fleet that keeps the level with the probability asked for, assessed over all draws."""
    search = search_of(scenario)
    good = [row for row in rows if row.figures is not None]
    if not good:
        raise CapacityError(list(dict.fromkeys(fault for row in rows for fault in row.faults))[:10])
    objective, sense = objective_of(scenario)
    ranked = sorted(good, key=lambda row: row.figure(objective) * sense)
    kept = [row for row in ranked if is_met(row.figures or {}, scenario)]
    best: tuple[float, Survivor] | None = None
    for row in kept[:MOST_ASSESSED]:
        assessed = assess_fleet(scenario.what_if(row.screened["changes"]), executor)
        row.figures = {**(row.figures or {}), **assessed}
        chance = assessed["probability"]
        if chance is None or chance >= search.probability:
            return row
        if best is None or chance > best[0]:
            best = (chance, row)
    most = max(good, key=lambda row: (row.figures or {})["attained"]) if best is None else best[1]
    got = most.figures or {}
    late = {name: got[f"missed_{name}"] for name in ("ttft", "tpot", "e2e")}
    worst = max(late, key=lambda name: late[name])
    fails = f"{late[worst]:.0%} of a class exceed its {worst.upper()}" if late[worst] else "the queue grows"
    raise CapacityError(
        f"{scenario.where}: serve.slo: expected a fleet of at most {search.max_gpus} GPUs that serves "
        f"{search.attainment:.0%} of the requests of each class within its level, with probability "
        f"{search.probability}; the closest of {len(good)} simulated is {most.screened['deployment']}: "
        f"{got['attained']:.1%} within it ({fails}), p99 of TTFT {got['ttft_p99_s']:.3g} s, of TPOT "
        f"{got['tpot_p99_s'] * 1e3:.4g} ms"
        + (f", kept with probability {best[0]:.2f}" if best else "")
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
    """Return, for each choice of the winner, the best fleet that chose otherwise and how much worse it is."""
    objective, sense = objective_of(scenario)
    values = screened.columns[objective] * sense
    flat = [_choices(changes) for changes in screened.changes]
    rows = []
    for name, value in flat[winner.at].items():
        others = np.array([choices.get(name) != value for choices in flat]) & within
        if others.any():
            at = int(np.flatnonzero(others)[np.argmin(values[others])])
            rows.append(
                {
                    "choice": name, "value": flat[at].get(name), "instead_of": value,
                    "deployment": screened.labels[at], "objective": objective,
                    "ratio": float(screened.columns[objective][at] / screened.columns[objective][winner.at]),
                }
            )  # fmt: skip
    return rows


def _choices(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fleet's choices by a short name: ``decode replicas``, ``prefill ep_size``."""
    found: dict[str, Any] = {}
    for path, value in changes.items():
        name = path.removeprefix("serve.").removeprefix("deployment.").replace(".", " ")
        if isinstance(value, Mapping):
            found |= {f"{name.split()[0]} {key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found
