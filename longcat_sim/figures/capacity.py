"""A capacity search as a picture: every candidate, what was simulated, the level, the winner."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.figures.prediction import PALETTE

MAX_POINTS = 2000


def capacity_figure(result: Any) -> Any:
    """Return price against speed of a ``CapacityResult``: screened candidates by device, simulated ones, the level,
    and the winner with its interval. Under traffic the price is the whole bill."""
    import plotly.graph_objects as go

    figure = go.Figure()
    is_fleet = result.scenario.serve is not None
    cost = "usd_per_million_output_tokens" + ("_all_in" if is_fleet else "")
    screened = result.screened
    if screened is not None:
        at = np.linspace(0, len(screened) - 1, min(MAX_POINTS, len(screened))).astype(int)
        devices = np.array([shape.scenario.hardware.name for shape in screened.shapes])[screened.shape][at]
        for name, color in zip(dict.fromkeys(devices), ("#b9c7d6", "#e8c98f", "#b9d8c2", "#d3bfe0") * 8, strict=False):
            mine = at[devices == name]
            figure.add_scatter(
                x=screened.columns["tokens_per_s_per_user"][mine], y=screened.columns[cost][mine],
                mode="markers", marker={"size": 3, "color": color}, name=f"screened, {name}", hoverinfo="skip",
            )  # fmt: skip
    good = [row for row in result.survivors if row.figures is not None]
    figure.add_scatter(
        x=[row.figure("tokens_per_s_per_user") for row in good], y=[row.figure(cost) for row in good],
        text=[_label(row) for row in good], mode="markers", name="simulated, one run each",
        marker={"size": 8, "color": PALETTE[0], "line": {"width": 0.5, "color": "white"}},
        hovertemplate="%{text}<br>%{x:.4g} tokens/s per user<br>%{y:.4g} USD<extra></extra>",
    )  # fmt: skip
    limit = result.tpot_limit_s
    if limit is not None:
        shown = [value for trace in figure.data for value in trace.y]
        figure.add_scatter(
            x=[1 / limit] * 2, y=[min(shown), max(shown)], mode="lines", hoverinfo="skip",
            line={"dash": "dash", "color": "#8a94a3", "width": 1}, name=f"level: {limit * 1e3:g} ms per token",
        )  # fmt: skip
    winner = result.winner
    figure.add_scatter(
        x=[1 / winner.figure("tpot_s")], y=[winner.figure(cost)], error_y=_error(winner, cost),
        error_x=_error(winner, "tpot_s", invert=True), mode="markers", name="winner: median, 90 % interval",
        text=[_label(winner)], marker={"size": 15, "symbol": "star", "color": PALETTE[1]},
        hovertemplate="%{text}<br>%{x:.4g} tokens/s per user<br>%{y:.4g} USD<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        title=f"{_label(winner)} wins", template="plotly_white", height=460,
        xaxis={"title": "output tokens/s of one user", "type": "log"},
        yaxis={"title": "USD per million output tokens" + (", whole bill" if is_fleet else ""), "type": "log"},
    )  # fmt: skip
    return figure


def _error(row: Any, name: str, *, invert: bool = False) -> dict[str, Any] | None:
    """Return an interval as plotly draws it, of the figure or of one over it."""
    figures = row.figures or {}
    if f"{name}_p5" not in figures:
        return None
    low, middle, high = figures[f"{name}_p5"], row.figure(name), figures[f"{name}_p95"]
    if invert:
        low, middle, high = 1 / high, 1 / middle, 1 / low
    return {"type": "data", "symmetric": False, "array": [high - middle], "arrayminus": [middle - low], "thickness": 1}


def _label(row: Any) -> str:
    batch = row.screened.get("sequences_per_gpu")
    return row.screened["deployment"] + (f", {batch:g} sequences per GPU" if batch else "")
