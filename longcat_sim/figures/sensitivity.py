"""Tornado, variance by source, and two scenarios term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longcat_sim.figures.prediction import PALETTE


def tornado_figure(swings: Sequence[Any], *, figure_name: str, scale: float = 1.0, unit: str = "") -> Any:
    """Return bars from the figure at an input's low end to that at its high end, longest on top.

    ``swings`` are ``Swing``s; an end that could not be evaluated stays at the base.
    """
    import plotly.graph_objects as go

    rows = list(reversed([swing for swing in swings if swing.span > 0]))
    base = swings[0].base * scale if swings else 0.0
    figure = go.Figure()
    for side, (name, color) in enumerate((("input lower", PALETTE[1]), ("input higher", PALETTE[0]))):
        values = [(s.at_low if side == 0 else s.at_high) for s in rows]
        figure.add_bar(
            y=[s.path for s in rows], x=[(v * scale if v is not None else base) - base for v in values], base=base,
            orientation="h", name=name, marker={"color": color},
            customdata=[
                [s.low if side == 0 else s.high, (v or s.base) * scale] for s, v in zip(rows, values, strict=True)
            ],
            hovertemplate="%{y} = %{customdata[0]:.4g}<br>%{customdata[1]:.4g} " + unit + "<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        title=f"What moves {figure_name}", template="plotly_white", barmode="overlay", height=140 + 30 * len(rows),
        xaxis_title=f"{figure_name} {unit}".strip(), margin={"l": 10, "r": 10, "t": 48, "b": 8},
    )  # fmt: skip
    figure.update_yaxes(automargin=True)
    return figure


def variance_figure(shares: Mapping[str, float], *, title: str = "Where the interval comes from") -> Any:
    """Return the share of variance of each source as bars."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_bar(
        x=list(shares), y=[100 * share for share in shares.values()],
        marker={"color": list((PALETTE * 3)[: len(shares)])}, hovertemplate="%{x}: %{y:.1f} %<extra></extra>",
    )  # fmt: skip
    figure.update_layout(title=title, template="plotly_white", height=320, yaxis_title="% of variance")
    return figure


def terms_figure(terms: Sequence[Any], names: Sequence[str], *, scale: float = 1e3, unit: str = "ms") -> Any:
    """Return the parts of a figure in two scenarios as stacked bars. ``terms`` are ``Term``s."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for term, color in zip(terms, PALETTE * 4, strict=False):
        figure.add_bar(
            x=list(names), y=[term.first * scale, term.second * scale], name=term.name, marker={"color": color},
            hovertemplate=term.name + ": %{y:.4g} " + unit + "<extra></extra>",
        )  # fmt: skip
    figure.update_layout(template="plotly_white", barmode="stack", height=400, yaxis_title=unit)
    return figure


def stacked_figure(names: Sequence[str], parts: Sequence[Mapping[str, float]]) -> Any:
    """Return parts in seconds of several scenarios as stacked bars in ms."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, color in zip(dict.fromkeys(name for row in parts for name in row), PALETTE * 4, strict=False):
        figure.add_bar(
            x=list(names), y=[row.get(part, 0.0) * 1e3 for row in parts], name=part, marker={"color": color},
            hovertemplate=part + ": %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(template="plotly_white", barmode="stack", height=400, yaxis_title="ms")
    return figure
