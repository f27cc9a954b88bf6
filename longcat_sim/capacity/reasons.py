"""Why a candidate wins and what binds it: the constraint that ends its batch, the resources its time goes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longcat_sim.capacity.answer import Survivor
from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.fleet import replicas_for
from longcat_sim.capacity.price import month_usd
from longcat_sim.capacity.samples import fast_figures
from longcat_sim.capacity.screen import Screened, Times, ranking
from longcat_sim.capacity.sensitivity import tornado
from longcat_sim.capacity.uncertainty import ScaledKinds
from longcat_sim.ops.op import OpTimesLike
from longcat_sim.specs.price import HOURS_PER_MONTH
from longcat_sim.specs.scenario import Scenario


def binding(
    screened: Screened, winner: Survivor, scenario: Scenario, op_times: Times, limit_s: float | None
) -> dict[str, Any]:
    """Return which constraint ends the winner's batch, and what its step time depends on (elasticities)."""
    shape = int(screened.shape[winner.at])
    batch, room = winner.screened["sequences_per_gpu"], screened.room[shape]
    mine = np.flatnonzero(screened.shape == shape)
    larger = mine[screened.columns["sequences_per_gpu"][mine] > batch]
    reached = (winner.figures or {}).get("tpot_s_at_probability", winner.figure("tpot_s"))
    if limit_s is not None and len(larger) and reached > 0.8 * limit_s:
        chance = search_of(scenario).probability
        constraint = "slo.tpot"
        text = f"the service level: {reached * 1e3:.4g} of {limit_s * 1e3:.4g} ms per token with probability {chance}"
    elif not len(larger) and batch + 1 > room:
        constraint, text = "memory", f"memory: at most {int(room)} sequences per GPU fit"
    elif not len(larger):
        constraint, text = "search range", f"the search range: {batch:g} sequences per GPU is its end"
    else:
        constraint, text = "none", "nothing ends its batch: a larger one is no better"
    candidate = screened.scenario(winner.at)
    elasticities = step_elasticities(candidate, op_times)
    strongest = max(elasticities, key=lambda name: elasticities[name], default="")
    return {
        "constraint": constraint, "resource": strongest, "step_time_shares": elasticities,
        "sentence": f"{text}; a step's time goes with {time_goes_with(elasticities)}",
    }  # fmt: skip


def time_goes_with(shares: Mapping[str, float]) -> str:
    """Return shares in words, largest first."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)


RESOURCES: Mapping[str, Callable[[str], bool]] = {
    "compute": lambda path: path.startswith("hardware.peak"),
    "memory bandwidth": lambda path: path == "hardware.memory_bandwidth",
    "scale-up link": lambda path: path.startswith("hardware.scale_up"),
    "scale-out link": lambda path: path.startswith("hardware.scale_out"),
}


def step_elasticities(
    candidate: Scenario, op_times: Times, step_s: Callable[[Scenario, OpTimesLike], float] | None = None
) -> dict[str, float]:
    """Return by which share a step shortens per relative improvement of each resource, and of the expert products.

    ``step_s`` gives a step's seconds; the scenario's own decode step where it is not given.
    """
    seconds = step_s or (lambda of, times: fast_figures(of, times)["step_s"])

    def step(of: Scenario) -> dict[str, float]:
        return {"step_s": seconds(of, op_times(of.hardware))}

    known = {f"hardware.{name}" for name in candidate.hardware._figures()}
    wanted = [p for p in sorted(known) if any(is_of(p) for is_of in RESOURCES.values()) and "domain" not in p]
    shares = dict.fromkeys(RESOURCES, 0.0)
    for swing in tornado(candidate, step, "step_s", wanted, by=0.1):
        for name, is_of in RESOURCES.items():
            if is_of(swing.path) and swing.elasticity is not None:
                shares[name] += swing.elasticity if swing.path.endswith("latency") else -swing.elasticity
    times = op_times(candidate.hardware)
    slower = seconds(candidate, ScaledKinds(times, {"grouped_gemm": 1.1}))
    shares["experts"] = (slower / seconds(candidate, times) - 1) / 0.1
    return {name: max(0.0, share) for name, share in shares.items()}


CHOICES = ("num_gpus", "ep_size", "tp_size", "dense_tp", "overlap")


def why(screened: Screened, winner: Survivor, scenario: Scenario, feasible: Any) -> list[dict[str, Any]]:
    """Return the best feasible candidate of each other device, and for each other choice that of those that chose
    otherwise, and how much worse it is.

    ``feasible`` says which candidates keep the level as safely as the winner [N] (None: all).
    """
    objective = search_of(scenario).objective
    values = ranking(screened, scenario)
    allowed = np.ones(len(values), dtype=bool) if feasible is None else feasible

    def choice(shape: int, name: str) -> Any:
        of = screened.shapes[shape].scenario
        return of.hardware.name if name == "hardware" else getattr(of.deployment, name)

    mine = int(screened.shape[winner.at])
    rows = []
    every = range(len(screened.shapes))
    devices = dict.fromkeys(choice(i, "hardware") for i in every if choice(i, "hardware") != choice(mine, "hardware"))
    cases = [("hardware", [i for i in every if choice(i, "hardware") == device]) for device in devices]
    cases += [(name, [i for i in every if choice(i, name) != choice(mine, name)]) for name in CHOICES]
    for name, others in cases:
        at = np.flatnonzero(np.isin(screened.shape, others) & allowed)
        if not len(at):
            continue
        best = int(at[np.argmin(values[at])])
        rows.append(
            {
                "choice": name, "value": choice(int(screened.shape[best]), name), "instead_of": choice(mine, name),
                "deployment": screened.shapes[int(screened.shape[best])].label, "objective": objective,
                "ratio": float(values[best] / values[winner.at]),
            }
        )  # fmt: skip
    return rows


def fleet_rate(winner: Survivor, scenario: Scenario, winner_scenario: Scenario) -> dict[str, Any]:
    """Return what ``max_gpus`` of the winner carry at the service level, or the replicas that make the wanted rate;
    spare replicas are left out of what is carried, and paid."""
    search = search_of(scenario)
    per_replica = int(winner.screened["num_gpus"])
    per_gpu = winner.screened["sequences_per_gpu"] / winner.figure("tpot_s")
    replicas = search.max_gpus // per_replica
    if search.output_tokens_per_s is not None:
        replicas = replicas_for(search.output_tokens_per_s, per_replica * per_gpu, spare=search.spare_replicas)
    working = max(0, replicas - search.spare_replicas)
    whole, figures = working * per_replica * winner.screened["sequences_per_gpu"], winner.figures or {}
    interval = {
        f"output_tokens_per_s_{at}": whole / figures[f"tpot_s_{other}"]
        for at, other in (("p5", "p95"), ("p95", "p5"))
        if f"tpot_s_{other}" in figures
    }
    month = month_usd(replicas * per_replica, winner_scenario.usd_per_gpu_hour)
    asked = search.output_tokens_per_s or working * per_replica * per_gpu
    return {
        "output_tokens_per_s": working * per_replica * per_gpu, **interval, "requests_per_s": None,
        "usd_per_month": month, "asked_output_tokens_per_s": search.output_tokens_per_s,
        "usd_per_million_output_tokens": month / (asked * HOURS_PER_MONTH * 3600 / 1e6) if asked else None,
        "replicas": replicas,
        "spare_replicas": search.spare_replicas, "num_gpus": replicas * per_replica,
        "concurrent_users": whole,
    }  # fmt: skip
