"""What a figure depends on: tornado, "what would have to be true", and a comparison of two scenarios term by term."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from longcat_sim.capacity.paths import encoded, number_at, with_figure
from longcat_sim.capacity.sweep import Evaluate, sweep
from longcat_sim.errors import CapacityError, UserError
from longcat_sim.specs.scenario import Scenario

HARDWARE_PATHS = (
    "hardware.memory_bandwidth",
    "hardware.scale_up.bandwidth",
    "hardware.scale_up.latency",
    "hardware.scale_out.bandwidth",
    "hardware.scale_out.latency",
    "hardware.memory",
)


@dataclass(frozen=True)
class Swing:
    """How a figure moves when one input moves from ``low`` to ``high``."""

    path: str
    low: float
    high: float
    at_low: float | None
    """The figure there; None where the scenario cannot be evaluated."""
    at_high: float | None
    base: float
    """The figure of the unchanged scenario."""
    faults: tuple[str, ...] = ()

    @property
    def span(self) -> float:
        """Length of the bar."""
        values = [v for v in (self.at_low, self.at_high, self.base) if v is not None]
        return max(values) - min(values)

    @property
    def elasticity(self) -> float | None:
        """Relative change of the figure per relative change of the input, over the whole swing."""
        if not self.at_low or not self.at_high or self.low <= 0 or self.high <= self.low:
            return None
        return math.log(self.at_high / self.at_low) / math.log(self.high / self.low)


def default_paths(scenario: Scenario) -> list[str]:
    """Return the figures that a tornado moves unless told otherwise: those that this scenario has."""
    paths = [f"hardware.peak.{dtype}" for dtype in scenario.hardware.peak if _uses(scenario, dtype)]
    for path in (*HARDWARE_PATHS, "price.usd_per_gpu_hour", "step.context_tokens", "speculative.acceptance"):
        try:
            if number_at(scenario, path) > 0:
                paths.append(path)
        except CapacityError:
            continue
    return paths


def _uses(scenario: Scenario, dtype: str) -> bool:
    precision = scenario.deployment.precision
    return dtype in (precision.weights, precision.attention)


def tornado(
    scenario: Scenario,
    evaluate: Evaluate,
    figure: str,
    paths: Sequence[str] | Mapping[str, tuple[float, float]] | None = None,
    *,
    by: float = 0.2,
    executor: Executor | None = None,
) -> list[Swing]:
    """Return how ``figure`` moves with each input, longest bar first.

    ``paths`` maps a path to its (low, high) in base units, or lists paths, each moved down and up by the share ``by``.

    Raises:
        CapacityError: a path that is no number, or a figure that the evaluation does not give.
    """
    chosen = default_paths(scenario) if paths is None else paths
    ends: dict[str, tuple[float, float]] = {}
    for path in chosen:
        now = number_at(scenario, path)
        is_share = path.startswith("speculative.acceptance")
        ends[path] = chosen[path] if isinstance(chosen, Mapping) else (now * (1 - by), now * (1 + by))
        if is_share:
            ends[path] = (max(ends[path][0], 0.0), min(ends[path][1], 1.0))
    cases: list[Scenario] = [scenario]
    faults: dict[tuple[str, int], tuple[str, ...]] = {}
    place: dict[tuple[str, int], int] = {}
    for path, pair in ends.items():
        for side, value in enumerate(pair):
            try:
                cases.append(with_figure(scenario, path, value))
                place[path, side] = len(cases) - 1
            except UserError as error:
                faults[path, side] = error.faults
    points = sweep(cases, evaluate, executor)
    if points[0].figures is None:
        raise CapacityError(points[0].faults)
    base = figure_of(points[0].figures, figure)
    swings = []
    for path, (low, high) in ends.items():
        values: list[float | None] = []
        wrong: list[str] = []
        for side in (0, 1):
            point = points[place[path, side]] if (path, side) in place else None
            wrong += faults.get((path, side), ()) if point is None else point.faults
            values.append(None if point is None or point.figures is None else figure_of(point.figures, figure))
        swings.append(Swing(path, low, high, values[0], values[1], base, tuple(wrong)))
    return sorted(swings, key=lambda swing: -swing.span)


def figure_of(figures: Mapping[str, float], name: str) -> float:
    """Return one figure of an evaluation.

    Raises:
        CapacityError: it is not among them; lists those that are.
    """
    if name not in figures or figures[name] is None:
        known = ", ".join(key for key, value in figures.items() if value is not None)
        raise CapacityError(f"figure: expected one of {known}; got {name!r}; choose one")
    return float(figures[name])


def solve_for(
    scenario: Scenario,
    evaluate: Evaluate,
    figure: str,
    target: float | Scenario,
    path: str,
    bounds: tuple[float, float] | None = None,
    *,
    rtol: float = 1e-4,
) -> float:
    """Return the value at ``path`` for which ``figure`` reaches ``target`` (a number, or another scenario's figure).

    ``bounds`` in base units; by default a hundredth to a hundred times the present value (a ratio: 0 to 1).

    Raises:
        CapacityError: no value in the bounds does it; says what the figure is at both ends.
    """
    from scipy.optimize import brentq

    wanted = figure_of(evaluate(target), figure) if isinstance(target, Scenario) else float(target)
    now = number_at(scenario, path)
    is_share = path.endswith("acceptance") or path.endswith("utilisation")
    if bounds is None:
        bounds = (0.0 if path.endswith("acceptance") else 0.01, 1.0) if is_share else (now / 100, now * 100)
    low, high = bounds
    is_log = low > 0 and not is_share

    def excess(x: float) -> float:
        value = math.exp(x) if is_log else x
        got = figure_of(evaluate(with_figure(scenario, path, value)), figure)
        return math.log(got / wanted) if got > 0 and wanted > 0 else got - wanted

    ends = (math.log(low), math.log(high)) if is_log else (low, high)
    at = [excess(x) for x in ends]
    if at[0] * at[1] > 0:
        figures = [figure_of(evaluate(with_figure(scenario, path, value)), figure) for value in bounds]
        raise CapacityError(
            f"{path}: expected a value between {encoded(scenario, path, low):.6g} and "
            f"{encoded(scenario, path, high):.6g} that makes {figure} {wanted:.6g}; it goes from {figures[0]:.6g} to "
            f"{figures[1]:.6g} there; no value of this input does it: change another"
        )
    if at[0] == 0 or at[1] == 0:
        return low if at[0] == 0 else high
    root = brentq(excess, *ends, rtol=rtol, xtol=1e-9)
    return float(math.exp(root) if is_log else root)


@dataclass(frozen=True)
class Term:
    """One figure or one part of a figure in two scenarios."""

    name: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def ratio(self) -> float | None:
        """Second over first; None where first is 0."""
        return self.second / self.first if self.first else None


def terms(first: Mapping[str, float], second: Mapping[str, float]) -> list[Term]:
    """Return what two evaluations have in common (numbers), a part that one lacks counting as 0."""
    names = [name for name in {**first, **second} if _is_number(first.get(name, 0)) and _is_number(second.get(name, 0))]
    return [Term(name, float(first.get(name, 0.0)), float(second.get(name, 0.0))) for name in names]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
