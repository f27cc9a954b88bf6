"""``compare``: scenarios side by side, figure by figure and part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.samples import decode_figures
from longcat_sim.capacity.sensitivity import Term, terms
from longcat_sim.errors import CapacityError
from longcat_sim.simulation.step import simulate_step
from longcat_sim.specs.scenario import Scenario


@dataclass
class Comparison:
    """Figures and parts of a step [scenario][name]; the first scenario is the base."""

    names: list[str]
    figures: list[dict[str, float]]
    parts: list[dict[str, float]]
    """Where the time goes, in seconds; they add up to the step."""

    def terms(self, other: str | None = None) -> list[Term]:
        """Return the parts of the base and of ``other`` (the second by default)."""
        return terms(self.parts[0], self.parts[self.names.index(other) if other else 1])

    def __str__(self) -> str:
        width = max(len(name) for row in (*self.figures, *self.parts) for name in row) + 2
        lines = [" " * width + "".join(f"{name:>22}" for name in self.names)]
        for rows, scale, unit in ((self.figures, 1.0, ""), (self.parts, 1e3, " ms")):
            for name in dict.fromkeys(key for row in rows for key in row):
                base = rows[0].get(name, 0.0)
                cells = []
                for row in rows:
                    value = row.get(name, 0.0)
                    ratio = f" ({value / base - 1:+.0%})" if base and row is not rows[0] else ""
                    cells.append(f"{value * scale:.4g}{unit}{ratio}")
                lines.append(f"{name:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
            lines.append("")
        return "\n".join(lines).rstrip()

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Return figures and parts by scenario."""
        return {
            name: {**figures, "where_the_time_goes_s": parts}
            for name, figures, parts in zip(self.names, self.figures, self.parts, strict=True)
        }

    def figure(self) -> Any:
        """Return the parts of all scenarios as stacked bars."""
        from longcat_sim.figures.sensitivity import stacked_figure

        return stacked_figure(self.names, self.parts)


def compare(scenarios: Mapping[str, Scenario]) -> Comparison:
    """Return decode steps of several scenarios side by side, with the same draw of routing.

    Raises:
        CapacityError: fewer than two scenarios, or one without a decode step.
    """
    if len(scenarios) < 2:
        raise CapacityError(
            "scenarios: expected at least two, such as {'today': s, 'faster NIC': s.what_if({...})}; got "
            f"{len(scenarios)}; add one"
        )
    figures, parts = [], []
    for name, scenario in scenarios.items():
        if scenario.step is None or scenario.step.phase != "decode":
            raise CapacityError(f"{name}: step: expected a decode step to compare; add one, or compare other scenarios")
        step = simulate_step(scenario, op_times_of(scenario.hardware), seed=scenario.seed)
        figures.append(decode_figures(scenario, step.step_s))
        parts.append(step.breakdown.parts())
    return Comparison(list(scenarios), figures, parts)
