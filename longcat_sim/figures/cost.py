"""What a token costs: price against speed, and a bill by line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longcat_sim.figures.prediction import PALETTE


def cost_figure(curves: Mapping[str, Mapping[str, Any]], *, title: str = "What an output token costs") -> Any:
    """Return USD per million output tokens against tokens/s of one user, a line per deployment.

    Each curve has tokens_per_s_per_user, usd_per_million_output_tokens and sequences_per_gpu [N].
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for (name, curve), color in zip(curves.items(), PALETTE * 8, strict=False):
        figure.add_scatter(
            x=list(curve["tokens_per_s_per_user"]), y=list(curve["usd_per_million_output_tokens"]), name=name,
            customdata=list(curve["sequences_per_gpu"]), mode="lines+markers", marker={"size": 4},
            line={"color": color, "width": 2},
            hovertemplate="%{customdata:.4g} sequences per GPU<br>%{x:.4g} tokens/s per user<br>%{y:.4g} USD"
            "<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        title=title, template="plotly_white", height=420, margin={"l": 10, "r": 10, "t": 48, "b": 8},
        xaxis={"title": "output tokens/s of one user", "rangemode": "tozero"},
        yaxis={"title": "USD per million output tokens", "type": "log"},
    )  # fmt: skip
    return figure


def bill_figure(lines_usd: Mapping[str, float], *, title: str = "Where the bill goes") -> Any:
    """Return the lines of a bill as one bar each, with their shares."""
    import plotly.graph_objects as go

    total = sum(lines_usd.values()) or 1.0
    figure = go.Figure()
    figure.add_bar(
        x=list(lines_usd), y=list(lines_usd.values()), marker={"color": list(PALETTE[: len(lines_usd)])},
        text=[f"{usd / total:.0%}" for usd in lines_usd.values()], textposition="outside",
        hovertemplate="%{x}: %{y:.4g} USD<extra></extra>",
    )  # fmt: skip
    figure.update_layout(title=title, template="plotly_white", height=340, yaxis_title="USD", showlegend=False)
    return figure
