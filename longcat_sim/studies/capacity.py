"""``capacity``: which deployment answers a scenario's search best, simulated, with an interval and a reason."""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from longcat_sim.capacity import samples
from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.screen import tpot_limit_s
from longcat_sim.capacity.search import CapacityResult, search_steps
from longcat_sim.capacity.sweep import Progress
from longcat_sim.specs.scenario import Scenario


def simulate_candidate(scenario: Scenario) -> dict[str, float]:
    """Return one candidate's figures, simulated event by event on all ranks."""
    return samples.simulated_figures(scenario, op_times_of(scenario.hardware), seed=scenario.seed)


def assess_candidate(scenario: Scenario, limit_s: float | None, quantile: float) -> dict[str, float]:
    """Return one candidate's figures over all draws, and its chance of keeping the level."""
    times = op_times_of(scenario.hardware)
    return samples.assess(scenario, times, limit_s, draws=scenario.draws, quantile=quantile)


def capacity(
    scenario: Scenario,
    executor: Executor | None = None,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> CapacityResult:
    """Return the answer to the scenario's ``search:``.

    ``executor`` runs the simulations (None: this process); ``store`` keeps their results, so that a killed search
    resumes.

    Raises:
        CapacityError: nothing fits or keeps the service level; says what is closest and which constraint fails.
        SpecError: a scenario without a search, a step or traffic.
    """
    if scenario.serve is not None:
        from longcat_sim.studies.capacity_serving import serving_capacity

        return serving_capacity(scenario, executor, store=store, progress=progress)
    search = search_of(scenario)
    assess: Any = partial(assess_candidate, limit_s=tpot_limit_s(scenario), quantile=search.probability)
    return search_steps(
        scenario, op_times_of, simulate_candidate, assess, executor, store=store, progress=progress
    )  # fmt: skip
