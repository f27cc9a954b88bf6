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
from longcat_sim.capacity.price import usd_per_million_tokens
from longcat_sim.capacity.reasons import step_elasticities, time_goes_with
from longcat_sim.capacity.screen import check_reachable, objective_of, pareto, tpot_limit_s
from longcat_sim.capacity.screen_serving import (
    SCREEN_ERROR,
    ScreenedFleets,
    check_ttft_reachable,
    prompt_turns,
    screen_fleets,
)
from longcat_sim.capacity.search import kendall
from longcat_sim.capacity.sweep import Progress
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.capacity.uncertainty import check_draws
from longcat_sim.errors import CapacityError
from longcat_sim.specs.price import HOURS_PER_MONTH
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import StepFunction, budget_notes, pools_of
from longcat_sim.studies.fleet_figures import fleet_size, highest_rate, is_met, ttft_and_tpot_limits
from longcat_sim.studies.fleet_search import MORE, MOST_SIMULATED, FleetSearch, is_exact
from longcat_sim.studies.simulate import LEANING, leans_on

REASON_ROUNDS = 5
"""Times that alternatives to a winner are simulated, up to ``MORE`` at once. Assumed."""
FRONT = {"usd_per_million_output_tokens_all_in": 1, "tpot_s": 1, "ttft_s": 1}


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
            within &= screened.columns[name] <= limit * SCREEN_ERROR
    if not within.any():
        raise _closest(screened, scenario, ttft, tpot)
    front = pareto(screened.columns, FRONT, within)
    ranked = [int(i) for i in np.flatnonzero(within)[np.argsort(values[within], kind="stable")]]
    chosen = list(dict.fromkeys([*ranked[: search.survivors // 2], *front, *ranked]))[: search.survivors]
    began = time.perf_counter()
    fleets = FleetSearch(scenario, screened, ranked, executor, store, progress)
    winner, rows = fleets.run(chosen), fleets.rows
    if winner is None:
        raise _none_keeps_it(rows, scenario)
    winner, reasons = _reasons(screened, winner, fleets)
    best = scenario.what_if(screened.changes[winner.at])
    relied_on = _without_spares(best, search.spare_replicas)
    rate = highest_rate(relied_on, executor, stay_s=winner.figure("stay_s", 0.0))
    rate |= _fleet(best, winner, search.spare_replicas)
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
    traffic = Traffic.of(best)
    share, said = leans_on(
        best, traffic.decode_context, winner.figure("decode_sequences_per_replica", 1.0), traffic.computed_tokens
    )
    if share > LEANING:
        notes += [
            *said,
            f"{share:.0%} of the winner's op time was not measured on its hardware at its sizes: its place may change",
        ]
    cheaper = {int(i) for i in np.flatnonzero(within & (values < values[winner.at]))} - {row.at for row in rows}
    left = len(fleets.better_than(winner))
    if len(cheaper) > left:
        notes.append(
            f"{len(cheaper) - left} better fleets were not simulated: no larger than one of the same deployments that "
            "missed the level, or with no larger a prefill pool than one whose first tokens were late"
        )
    if left:
        notes.append(
            f"{left} better fleets were not simulated, and one may keep the level: a search ends at {MOST_SIMULATED} "
            "simulated fleets; search fewer deployments"
        )
    if scenario.draws == 1:
        notes.append("draws: 1 is a point estimate, without intervals or a probability; --set draws=16 gives both")
    front_rows = [good[i].to_json() | {"keeps_level": is_met(good[i].figures or {}, scenario)} for i in shown]
    return CapacityResult(
        scenario, winner, rows, front_rows, _binding(relied_on, rate),
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


def _fleet(scenario: Scenario, winner: Survivor, spare: int) -> dict[str, Any]:
    """Return what the fleet makes and costs under the traffic that it is for. A run of it serves a few per cent more or
    fewer tokens than that traffic has on average, and so its own price differs."""
    assert scenario.serve is not None
    pools = pools_of(scenario, scenario.serve)
    gpus = sum(fleet_size(scenario, name) * part.deployment.num_gpus for name, part in pools.items())
    traffic = Traffic.of(scenario)
    rate, usd_per_hour = traffic.requests_per_s * traffic.output_tokens, winner.figure("usd_per_hour")
    return {
        "output_tokens_per_s": rate, "num_gpus": gpus, "usd_per_month": usd_per_hour * HOURS_PER_MONTH,
        "usd_per_million_output_tokens": usd_per_million_tokens(usd_per_hour, rate),
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
    batch = max(1.0, float(rate["decode_sequences_per_replica"]))
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


def _none_keeps_it(rows: list[Survivor], scenario: Scenario) -> CapacityError:
    """Return the error of a search in which no simulated fleet keeps the level; says the closest."""
    search = search_of(scenario)
    good = [row for row in rows if row.figures is not None]
    if not good:
        return CapacityError(list(dict.fromkeys(fault for row in rows for fault in row.faults))[:10])
    most = max(good, key=lambda row: (row.figure("probability", -1.0), row.figure("attained")))
    got = most.figures or {}
    late = {name: got[f"missed_{name}"] for name in ("ttft", "tpot", "e2e")}
    worst = max(late, key=lambda name: late[name])
    fails = f"{late[worst]:.0%} of a class exceed its {worst.upper()}" if late[worst] else "the queue grows"
    chance = got.get("probability")
    return CapacityError(
        f"{scenario.where}: serve.slo: expected a fleet of at most {search.max_gpus} GPUs that serves "
        f"{search.attainment:.0%} of the requests of each class within its level, with probability "
        f"{search.probability}; the closest of {len(good)} simulated is {most.screened['deployment']}: "
        f"{got['attained']:.1%} within it ({fails}), p99 of TTFT {got['ttft_p99_s']:.3g} s, of TPOT "
        f"{got['tpot_p99_s'] * 1e3:.4g} ms"
        + (f", kept with probability {chance:.2f}" if chance is not None else "")
        + "; loosen the level, allow more GPUs, simulate more (search.survivors), or search other deployments"
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


def _reasons(screened: ScreenedFleets, winner: Survivor, fleets: FleetSearch) -> tuple[Survivor, list[dict[str, Any]]]:
    """Return the winner and the best fleets that chose otherwise, simulated as long as it was: one that a run shows to
    miss the level is no alternative, and one that it shows to be better is the winner."""
    for _ in range(REASON_ROUNDS):
        named, run = _why(screened, winner, fleets), {row.at: row for row in fleets.rows}
        unknown = [at for at in named if at not in run][:MORE]
        if not unknown and fleets.lasted.issuperset(named):
            break
        fleets.simulate(unknown)
        fleets.run_long([run[at] for at in named if at in run and at not in fleets.lasted][:MORE])
        winner = fleets.run(()) or winner
    return winner, [row for rows in _why(screened, winner, fleets).values() for row in rows]


def _why(screened: ScreenedFleets, winner: Survivor, fleets: FleetSearch) -> dict[int, list[dict[str, Any]]]:
    """Return, for each choice of the winner, the best fleet that chose otherwise and how much worse it is, by fleet."""
    objective, sense = objective_of(fleets.scenario)
    flat = [_choices(changes) for changes in screened.changes]
    run = {row.at: row for row in fleets.rows}

    def ratio(at: int) -> float:
        """Return by how much a fleet's objective differs from the winner's, both simulated or both screened."""
        if at in run and not is_exact(objective):
            return run[at].figure(objective) / winner.figure(objective)
        return float(screened.columns[objective][at] / screened.columns[objective][winner.at])

    worse = {at: ratio(at) for at in fleets.possible(fleets.ranked)}
    worse = {at: found for at, found in worse.items() if at != winner.at and found**sense >= 1 - 1e-9}
    found: dict[int, list[dict[str, Any]]] = {}
    for name, value in flat[winner.at].items():
        others = [at for at in worse if flat[at].get(name) != value]
        if not others:
            continue
        at = min(others, key=lambda one: (worse[one] ** sense, one not in run))
        found.setdefault(at, []).append(
            {
                "choice": name, "value": flat[at].get(name), "instead_of": value, "deployment": screened.labels[at],
                "objective": objective, "ratio": worse[at], "is_simulated": at in fleets.lasted,
            }
        )  # fmt: skip
    return found


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
