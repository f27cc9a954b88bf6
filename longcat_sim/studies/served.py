"""One run of a scenario's traffic with its bill: what ``simulate`` and ``capacity`` both print figures of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.errors import WorkloadError
from longcat_sim.ops.op import OpTimesLike
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.request import COMPLETED
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.simulation.step import discrepancy_factors
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import StepFunction, decode_context_spread, engine, kv_link, pools_of
from longcat_sim.studies.fleet_bill import fleet_bill

MOST_ENGINES = 256
_engines: dict[Any, Engine] = {}


def times_of(scenario: Scenario, draw: int = 0) -> OpTimesLike:
    """Return the op times of the scenario's device: the fit (0), or one of its draws."""
    times = op_times_of(scenario.hardware)
    return times.draw(draw) if draw else times


def engine_of(scenario: Scenario, draw: int = 0, role: str = "shared") -> Engine:
    """Return a replica's engine; the same object for the same deployment, scheduler and draw of the calibration."""
    assert scenario.serve is not None
    key = (
        scenario.model.model_dump_json(), op_times_of(scenario.hardware), draw,
        scenario.deployment.model_dump_json(), scenario.routing.model_dump_json(), scenario.speculative,
        scenario.serve.scheduler.model_dump_json(), decode_context_spread(scenario.serve), role,
    )  # fmt: skip
    if key not in _engines:
        if len(_engines) >= MOST_ENGINES:
            _engines.clear()
        _engines[key] = engine(scenario, times_of(scenario, draw), scenario.serve, role)
    return _engines[key]


def serve_once(
    scenario: Scenario, draw: int = 0, *, step_by_step: bool = False, window: tuple[float, float] | None = None,
    is_priced: bool = True,
) -> tuple[ServingResult, dict[str, Any]]:  # fmt: skip
    """Return one run of the traffic and its figures, prices included.

    ``draw`` 0 is the fit, the scenario's seed and no model error; another takes that draw of the calibration, a traffic
    seed of its own, and one factor on all step times: whole systems are further from their prediction than their ops
    are from theirs. ``window`` keeps the spans of those seconds; without ``is_priced`` there is no bill.
    """
    serve = scenario.serve
    assert serve is not None
    pools = pools_of(scenario, serve)
    engines = {name: engine_of(part, draw, name) for name, part in pools.items()}
    if draw:
        factor = float(discrepancy_factors(max(scenario.draws, draw), scenario.seed)[draw - 1])
        engines = {name: replace(made, step_times=made.step_times.scaled(factor)) for name, made in engines.items()}
    run = simulate_serving(
        serve, engines if serve.is_disaggregated else engines["shared"], kv_link=kv_link(scenario, serve),
        acceptance=scenario.speculative.acceptance, seed=scenario.seed + draw, step_by_step=step_by_step,
        trace_window_s=window,
    )  # fmt: skip
    figures = run.metrics()
    if not len(run.records):
        raise WorkloadError(
            f"{scenario.where}: serve.workload.duration: expected a time in which one request arrives at least, such "
            f"as 10 min; got {serve.workload.duration or 0:g} s, in which none does; lengthen it or raise arrivals.rate"
        )
    if not figures["requests"]:
        last_s = float(run.records.numpy("arrival").max()) * 1e-9
        raise WorkloadError(
            f"{scenario.where}: serve.workload.warm_up: expected less than the traffic lasts ({last_s:.4g} s); got "
            f"{serve.workload.warm_up:g} s, which leaves no request to count; shorten it or lengthen the traffic"
        )
    figures["decode_sequences_per_replica"] = _decode_sequences(run, figures["window_s"])
    if not is_priced:
        return run, figures
    steps = {name: StepFunction(part, times_of(part, draw)) for name, part in pools.items()}
    on_demand = scenario.price.basis == "on_demand"
    paid = fleet_bill(run, steps, scenario.usd_per_gpu_hour, is_on_demand=on_demand)
    figures |= paid.figures()
    for name, pool in run.pools.items():
        replica_s = paid.gpu_hours_by_pool[name] * 3600.0 / pool.num_gpus
        figures["busy_s_by_pool"][name] = replica_s * paid.busy_ratio_by_pool[name]
        figures["idle_s_by_pool"][name] = replica_s * (1 - paid.busy_ratio_by_pool[name])
    return run, figures


def _decode_sequences(run: ServingResult, window_s: tuple[float, float]) -> float:
    """Return the mean number of sequences that one replica decodes at once in a window of the run."""
    columns = run.records
    done = columns.numpy("status") == COMPLETED
    start, end = (bound * 1e9 for bound in window_s)
    if not done.any() or end <= start:
        return 0.0
    first, last = columns.numpy("first")[done], columns.numpy("last")[done]
    inside = np.minimum(last, end) - np.maximum(first, start)
    pool = run.pools.get("decode") or run.pools["shared"]
    return float(np.maximum(inside, 0.0).sum()) / (end - start) / pool.num_replicas
