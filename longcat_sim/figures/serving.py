"""Figures of a serving run: latency and load over time."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_POINTS = 800
"""Requests shown: every dot is an element of the page, and thousands slow whatever else moves on it."""


def latency_figure(run: Any) -> Any:
    """Return TTFT and TPOT of each request over its arrival, with running medians. ``run`` is a ``ServingResult``."""
    from plotly.subplots import make_subplots

    columns = run.records
    done = columns.numpy("status") == 1
    arrival = columns.numpy("arrival")[done] * 1e-9
    first, last = columns.numpy("first")[done] * 1e-9, columns.numpy("last")[done] * 1e-9
    outputs = columns.numpy("output")[done]
    order = np.argsort(arrival)
    ttft = (first - arrival)[order]
    tpot = ((last - first) / np.maximum(outputs - 1, 1))[order] * 1e3
    at = arrival[order] / 60
    keep = np.linspace(0, len(at) - 1, min(len(at), MAX_POINTS)).astype(int) if len(at) else np.array([], dtype=int)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (values, name, color) in enumerate(
        ((ttft, "TTFT (s)", "#2a6f97"), (tpot, "TPOT (ms)", "#d1495b")), start=1
    ):
        figure.add_scatter(
            x=at[keep], y=values[keep], mode="markers", marker={"size": 3, "color": color, "opacity": 0.35},
            name=name, row=row, col=1,
        )  # fmt: skip
        edges, median = _running_median(at, values)
        figure.add_scatter(x=edges, y=median, mode="lines", line={"color": color, "width": 2}, showlegend=False,
                           name=f"{name}, median", row=row, col=1)  # fmt: skip
        figure.update_yaxes(title_text=name, row=row, col=1, rangemode="tozero")
    figure.update_xaxes(title_text="arrival (min)", row=2, col=1)
    title = "Latency over the run" + (f" ({len(keep)} of {len(at):,} requests)" if len(keep) < len(at) else "")
    figure.update_layout(template="plotly_white", height=460, title=title, showlegend=False)
    return figure


def _running_median(at: Any, values: Any, bins: int = 60) -> tuple[Any, Any]:
    """Return (mid time, median) of equal time bins that hold anything."""
    if not len(at):
        return np.array([]), np.array([])
    edges = np.linspace(at[0], at[-1] + 1e-9, bins + 1)
    which = np.clip(np.searchsorted(edges, at, "right") - 1, 0, bins - 1)
    filled = [i for i in range(bins) if np.any(which == i)]
    return (
        np.array([(edges[i] + edges[i + 1]) / 2 for i in filled]),
        np.array([np.median(values[which == i]) for i in filled]),
    )
