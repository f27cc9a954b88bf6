"""What-if studies of a decode step: tornado, solve-for, where the interval comes from, what to measure next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from longcat_sim.capacity import samples, sensitivity
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.sensitivity import Swing
from longcat_sim.capacity.uncertainty import Advice, Discrepancy, Uncertainty, measure_next, uncertainty
from longcat_sim.specs.scenario import Scenario

FIGURE = "usd_per_million_output_tokens"


def evaluate(scenario: Scenario) -> dict[str, float]:
    """Return a decode step's figures by the vectorised step model."""
    return samples.fast_figures(scenario, op_times_of(scenario.hardware))


def tornado(
    scenario: Scenario, figure: str = FIGURE, paths: Sequence[str] | Mapping[str, tuple[float, float]] | None = None, *,
    by: float = 0.2, executor: Executor | None = None,
) -> list[Swing]:  # fmt: skip
    """Return how a figure moves with each input, longest bar first."""
    return sensitivity.tornado(scenario, evaluate, figure, paths, by=by, executor=executor)


def solve_for(
    scenario: Scenario, path: str, target: float | Scenario, figure: str = FIGURE,
    bounds: tuple[float, float] | None = None,
) -> float:  # fmt: skip
    """Return what ``path`` would have to be for the figure to reach ``target`` (a number or another scenario)."""
    return sensitivity.solve_for(scenario, evaluate, figure, target, path, bounds)


def where_from(
    scenario: Scenario, *, draws: int | None = None, log_residuals: Sequence[float] = ()
) -> Uncertainty:  # fmt: skip
    """Return intervals of a step's figures and the share of each source: calibration, routing, model error.

    ``log_residuals`` are log(measured / predicted) of whole systems that were left out of the fit; without them the
    step model's own spread on published steps is used.
    """
    known = Discrepancy(tuple(log_residuals), scenario.seed)
    sample = samples.step_sample(scenario, op_times_of(scenario.hardware), known)
    return uncertainty(sample, samples.STEP_SOURCES, draws or max(2, scenario.draws))


def what_to_measure(scenario: Scenario, figure: str = FIGURE, *, draws: int = 8) -> list[Advice]:
    """Return the kinds of op ranked by how much measuring them would narrow the figure's interval."""
    times = op_times_of(scenario.hardware)
    sample = samples.step_sample(scenario, times)
    routing = [sample({"routing": index})[figure] for index in range(1, draws + 1)]
    tags = {kind: tag for kind, (tag, seconds) in samples.kinds_of(scenario, times).items() if seconds > 0}
    other = float(np.var(routing, ddof=1))
    return measure_next(samples.figure_by_times(scenario, figure), times, tags, draws=draws, other_variance=other)
