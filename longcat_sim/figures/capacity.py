"""A capacity search as a picture: every candidate, the front, what was simulated, the winner."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.figures.prediction import PALETTE

MAX_POINTS = 2000


def capacity_figure(result: Any) -> Any:
    """Return price against speed of a ``CapacityResult``: screened candidates, front, simulated ones with intervals."""
    import plotly.graph_objects as go

    figure = go.Figure()
    screened = result.screened
    if screened is not None:
        at = np.linspace(0, len(screened) - 1, min(MAX_POINTS, len(screened))).astype(int)
        figure.add_scattergl(
            x=screened.columns["tokens_per_s_per_user"][at],
            y=screened.columns["usd_per_million_output_tokens"][at],
            mode="markers", marker={"size": 3, "color": "#c3cad3"}, name="screened", hoverinfo="skip",
        )  # fmt: skip
    good = [row for row in result.survivors if row.figures is not None]
    figure.add_scatter(
        x=[row.figure("tokens_per_s_per_user") for row in good],
        y=[row.figure("usd_per_million_output_tokens") for row in good],
        text=[_label(row) for row in good], mode="markers", name="simulated",
        marker={"size": 8, "color": PALETTE[0], "line": {"width": 0.5, "color": "white"}},
        hovertemplate="%{text}<br>%{x:.4g} tokens/s per user<br>%{y:.4g} USD<extra></extra>",
    )  # fmt: skip
    winner = result.winner
    figures = winner.figures or {}
    usd = winner.figure("usd_per_million_output_tokens")
    error = None
    if "usd_per_million_output_tokens_p95" in figures:
        error = {
            "type": "data", "symmetric": False, "array": [figures["usd_per_million_output_tokens_p95"] - usd],
            "arrayminus": [usd - figures["usd_per_million_output_tokens_p5"]],
        }  # fmt: skip
    figure.add_scatter(
        x=[winner.figure("tokens_per_s_per_user")], y=[usd], error_y=error, mode="markers", name="winner",
        text=[_label(winner)], marker={"size": 15, "symbol": "star", "color": PALETTE[1]},
        hovertemplate="%{text}<br>%{x:.4g} tokens/s per user<br>%{y:.4g} USD<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        title=f"{winner.screened['deployment']} wins", template="plotly_white", height=460,
        xaxis={"title": "output tokens/s of one user", "type": "log"},
        yaxis={"title": "USD per million output tokens", "type": "log"},
    )  # fmt: skip
    return figure


def _label(row: Any) -> str:
    batch = row.screened.get("sequences_per_gpu")
    return row.screened["deployment"] + (f", {batch:g} sequences per GPU" if batch else "")
