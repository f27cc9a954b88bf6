"""Training in pictures: the loss, the budget, and the studies' comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longcat_sim.figures.prediction import PALETTE


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last ``window`` values."""
    import numpy as np

    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return list((total[end] - total[start]) / (end - start))


def loss_figure(history: Sequence[Mapping[str, Any]], *, title: str = "Loss") -> Any:
    """Return the loss by step, its running mean, and the MTP head's loss from where it is trained."""
    import plotly.graph_objects as go

    steps = [row["step"] for row in history]
    losses = [row["loss"] for row in history]
    window = max(1, len(losses) // 40)
    figure = go.Figure()
    figure.add_scatter(x=steps, y=losses, mode="lines", name="batch", line={"color": "#c9d2dc", "width": 1})
    figure.add_scatter(
        x=steps, y=smoothed(losses, window), mode="lines", name=f"mean of {window} steps", line={"color": PALETTE[0]}
    )
    mtp = [(row["step"], row["mtp"]) for row in history if "mtp" in row]
    if mtp:
        figure.add_scatter(
            x=[step for step, _ in mtp], y=smoothed([value for _, value in mtp], window), mode="lines",
            name="MTP head (token after next)", line={"color": PALETTE[1]},
        )  # fmt: skip
    figure.update_layout(
        title=title, template="plotly_white", height=420, xaxis={"title": "step"},
        yaxis={"title": "cross entropy (nats per byte)"}, legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    return figure


def budget_figure(history: Sequence[Mapping[str, Any]], expected: float, *, window: int = 50) -> Any:
    """Return the mean FFN experts per token by step and layer, with the target's 1 % band."""
    import plotly.graph_objects as go

    figure = go.Figure()
    steps = [row["step"] for row in history]
    figure.add_hrect(y0=expected * 0.99, y1=expected * 1.01, fillcolor="#66a182", opacity=0.2, line_width=0)
    layers = len(history[0]["ffn_experts"]) if history else 0
    for layer in range(layers):
        color = PALETTE[layer % len(PALETTE)]
        for key, name, dash in (("ffn_experts", "mean", "solid"), ("ffn_experts_std", "std over tokens", "dot")):
            values = smoothed([row[key][layer] for row in history], window)
            figure.add_scatter(
                x=steps, y=values, mode="lines", name=f"layer {layer}, {name}", line={"color": color, "dash": dash}
            )
    figure.update_layout(
        title=f"FFN experts per token (target {expected:g}, band 1 %; means of {window} steps)", height=420,
        template="plotly_white", legend={"orientation": "h", "y": -0.2}, xaxis={"title": "step"},
        yaxis={"title": "FFN experts per token", "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
) -> Any:
    """Return lines of (x, mean, low, high) by name, with their bands."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (name, points) in enumerate(curves.items()):
        color = PALETTE[i % len(PALETTE)]
        xs = [point[0] for point in points]
        figure.add_scatter(
            x=xs + xs[::-1], y=[p[3] for p in points] + [p[2] for p in points][::-1], fill="toself", mode="none",
            fillcolor=color, opacity=0.15, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_scatter(x=xs, y=[p[1] for p in points], mode="lines+markers", name=name, line={"color": color},
                           marker={"size": 4})  # fmt: skip
    figure.update_layout(
        title=title, template="plotly_white", height=420, yaxis={"title": y},
        xaxis={"title": x, "type": "log" if log_x else "linear"}, legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    return figure
