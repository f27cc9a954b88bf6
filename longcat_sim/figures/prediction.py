"""Prediction against measurement: a log-log scatter with the line of equality and a band of relative error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PALETTE = ("#2a6f97", "#d1495b", "#66a182", "#edae49", "#7b4f9d", "#00798c", "#8d6b4f", "#5c677d", "#c06e9b")


def prediction_figure(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    title: str,
    unit: str = "s",
    band: float = 0.15,
) -> Any:
    """Return a figure of (measured, predicted, label) points by series, both axes in ``unit``, logarithmic."""
    import plotly.graph_objects as go

    figure = go.Figure()
    values = [v for series in points.values() for measured, predicted, _ in series for v in (measured, predicted)]
    low, high = (min(values) / 1.5, max(values) * 1.5) if values else (1.0, 10.0)
    figure.add_scatter(
        x=[low, high, high, low],
        y=[low * (1 + band), high * (1 + band), high * (1 - band), low * (1 - band)],
        fill="toself", mode="none", fillcolor="rgba(90,100,115,0.12)", name=f"±{band:.0%}", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"color": "#8a94a3", "width": 1}, name="equal",
        hoverinfo="skip",
    )  # fmt: skip
    for (name, series), color in zip(points.items(), PALETTE * 8, strict=False):
        figure.add_scatter(
            x=[measured for measured, _, _ in series],
            y=[predicted for _, predicted, _ in series],
            text=[label for _, _, label in series],
            mode="markers",
            name=name,
            marker={"color": color, "size": 8, "line": {"width": 0.5, "color": "white"}},
            hovertemplate="%{text}<br>measured %{x:.4g} " + unit + "<br>predicted %{y:.4g} " + unit + "<extra></extra>",
        )
    figure.update_layout(
        title=title, template="plotly_white", height=460, legend={"orientation": "v"},
        xaxis={"type": "log", "title": f"measured ({unit})"}, yaxis={"type": "log", "title": f"predicted ({unit})"},
    )  # fmt: skip
    return figure
