"""``compare``: steps of several scenarios side by side, figure by figure and part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_sim.capacity.interval import Interval
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.sensitivity import Term, terms
from longcat_sim.errors import CapacityError
from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.step import simulate_draws, simulate_step
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.result import SHOWN
from longcat_sim.studies.simulate import step_figures


@dataclass
class Comparison:
    """Figures and parts of a step [scenario][name]; the first scenario is the base."""

    names: list[str]
    figures: list[dict[str, Interval]]
    """As ``simulate`` gives them."""
    ratios: list[dict[str, Interval]]
    """Each figure over the base's, draw by draw: both see the same routing, calibration and error of the step model,
    so that what is uncertain in both alike does not widen it. Figures that the base does not have are left out."""
    parts: list[dict[str, float]]
    """Where the time goes, in seconds; they add up to the step that was run event by event."""

    def terms(self, other: str | None = None) -> list[Term]:
        """Return the parts of the base and of ``other`` (the second by default)."""
        return terms(self.parts[0], self.parts[self.names.index(other) if other else 1])

    def __str__(self) -> str:
        rows = [["", *self.names]]
        for key in self.figures[0]:
            name, unit, scale = SHOWN[key]
            cells = [figures[key].show(scale) for figures in self.figures]
            rows.append([f"{name}, {unit}", *cells])
            rows.append(["", "", *(_change(ratios.get(key)) for ratios in self.ratios[1:])])
        rows.append(["parts of one step run event by event, ms", *("" for _ in self.names)])
        for part in dict.fromkeys(name for parts in self.parts for name in parts):
            rows.append([f"  {part}", *(f"{parts.get(part, 0.0) * 1e3:.3f}" for parts in self.parts)])
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = [
            "  ".join(f"{cell:{'<' if at == 0 else '>'}{widths[at]}}" for at, cell in enumerate(row)).rstrip()
            for row in rows
        ]
        return "\n".join(line for line in lines if line)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Return figures, their ratio to the base's, and parts by scenario."""
        return {
            name: {
                **{key: value.to_json() for key, value in figures.items()},
                "ratio_to_base": {key: value.to_json() for key, value in ratios.items()},
                "where_the_time_goes_s": parts,
            }
            for name, figures, ratios, parts in zip(self.names, self.figures, self.ratios, self.parts, strict=True)
        }

    def figure(self) -> Any:
        """Return the parts of all scenarios as stacked bars."""
        from longcat_sim.figures.sensitivity import stacked_figure

        return stacked_figure(self.names, self.parts)


def compare(scenarios: Mapping[str, Scenario]) -> Comparison:
    """Return steps of several scenarios side by side, in the same draws: those of the first scenario.

    Raises:
        CapacityError: fewer than two scenarios, one without a step, or steps of different phases.
    """
    if len(scenarios) < 2:
        raise CapacityError(
            "scenarios: expected at least two, such as {'today': s, 'faster NIC': s.what_if({...})}; got "
            f"{len(scenarios)}; add one"
        )
    base = next(iter(scenarios.values()))
    drawn: list[dict[str, FloatArray]] = []
    parts = []
    for name, scenario in scenarios.items():
        if scenario.step is None:
            raise CapacityError(f"{name}: step: expected a step to compare, got none; add one, or compare others")
        assert base.step is not None
        if scenario.step.phase != base.step.phase:
            raise CapacityError(
                f"{name}: step.phase: expected {base.step.phase}, as the first scenario's; got "
                f"{scenario.step.phase}; compare steps of one phase"
            )
        times = op_times_of(scenario.hardware)
        drawn.append(step_figures(scenario, simulate_draws(scenario, times, base.draws, seed=base.seed)))
        parts.append(simulate_step(scenario, times, seed=base.seed).breakdown.parts())
    return Comparison(
        list(scenarios),
        [{key: Interval.of(values) for key, values in figures.items()} for figures in drawn],
        [
            {key: Interval.of(values / drawn[0][key]) for key, values in figures.items() if np.all(drawn[0][key])}
            for figures in drawn
        ],
        parts,
    )  # fmt: skip


def _change(ratio: Interval | None) -> str:
    """Return a ratio as a change; of a figure that the base does not have, nothing."""
    if ratio is None:
        return ""
    low, middle, high = (f"{100 * (value - 1):+.1f}" for value in (ratio.p5, ratio.median, ratio.p95))
    return f"{middle}%" if low == high else f"{middle} [{low}, {high}]%"
