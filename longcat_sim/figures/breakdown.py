"""Where the time of a step goes: one bar per step, its parts stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_sim.simulation.step import StepResult

COLORS: dict[str, str] = {
    "compute": "#2a6f97",
    "launch floors": "#8a94a3",
    "contention loss": "#edae49",
    "exposed communication": "#d1495b",
    "waiting for the slowest rank": "#7b4f9d",
}


def breakdown_figure(results: Mapping[str, StepResult], *, title: str = "where the step's time goes") -> Any:
    """Return a stacked bar for each named step; the parts add up to the step."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, color in COLORS.items():
        values = [result.breakdown.parts()[part] * 1e3 for result in results.values()]
        figure.add_bar(
            x=values, y=list(results), orientation="h", name=part, marker={"color": color},
            hovertemplate=f"{part}: %{{x:.3f}} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        title=title, barmode="stack", xaxis_title="ms", template="plotly_white", height=140 + 48 * len(results),
        legend={"orientation": "h", "y": -0.4}, margin={"l": 10, "r": 10, "t": 48, "b": 8},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
