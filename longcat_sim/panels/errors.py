"""How close is close enough: predictions over what they are compared with, and how many lie within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from longcat_sim.errors import CapacityError
from longcat_sim.figures.prediction import PALETTE
from longcat_sim.panels.base import Control, Panel

ALL = "all"


class ComparedRow(Protocol):
    """One line of a table of predictions."""

    quantity: str
    predicted: float
    measured_or_published: float | None
    low: float | None
    high: float | None


class Table(Protocol):
    """A named table of predictions."""

    name: str
    rows: Any


class ErrorsPanel(Panel):
    """A dot for each comparison at predicted / compared with, its interval where known, in a band of tolerance."""

    def __init__(self, tables: Sequence[Table], tolerance: float = 0.1) -> None:
        self.rows: dict[str, list[ComparedRow]] = {}
        for table in tables:
            found = [row for row in table.rows if row.measured_or_published and row.predicted > 0]
            if found:
                self.rows[table.name] = found
        if not self.rows:
            raise CapacityError("tables: expected at least one row with a prediction and a measurement; got none")
        super().__init__([
            Control("tolerance", "tolerance, %", 100 * tolerance, 1.0, 60.0, 1.0),
            Control("table", "table", ALL, choices=(ALL, *self.rows)),
        ])  # fmt: skip

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        figure.add_scatter(
            x=[], y=[], fill="toself", mode="none", fillcolor="rgba(102,161,130,0.22)", name="within", hoverinfo="skip"
        )
        for name, color in zip(self.rows, PALETTE * 4, strict=False):
            figure.add_scatter(
                x=[], y=[], mode="markers", name=name, marker={"color": color, "size": 8},
                error_x={"type": "data", "symmetric": False, "array": [], "arrayminus": [], "thickness": 1},
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            )  # fmt: skip
        figure.add_vline(x=1.0, line_color="#8a94a3", line_width=1)
        figure.update_layout(
            margin={"l": 10, "r": 10, "t": 30, "b": 8},
            xaxis={"title": "predicted / measured or published", "type": "log"},
            yaxis={"automargin": True, "autorange": "reversed"},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        )  # fmt: skip
        return figure

    def _update(self) -> None:
        share, chosen = self.values["tolerance"] / 100, self.values["table"]
        shown = {name: rows if chosen in (ALL, name) else [] for name, rows in self.rows.items()}
        for trace, rows in zip(self.figure.data[1:], shown.values(), strict=True):
            trace.x, trace.y = [_ratio(row) for row in rows], [row.quantity for row in rows]
            trace.error_x.array = [_beyond(row, row.high) for row in rows]
            trace.error_x.arrayminus = [_beyond(row, row.low) for row in rows]
        flat = [row for rows in shown.values() for row in rows]
        names = list(dict.fromkeys(row.quantity for row in flat))
        low, high = 1 - share, 1 + share
        self.figure.data[0].x = [low, high, high, low]
        self.figure.data[0].y = [names[0], names[0], names[-1], names[-1]]
        self.figure.layout.height = 140 + 17 * len(names)
        inside = sum(low <= _ratio(row) <= high for row in flat)
        self.text = f"{inside} of {len(flat)} predictions within ±{share:.0%}"
        judged = [row for row in flat if row.low is not None and row.high is not None]
        if judged:
            held = sum(row.low <= row.measured_or_published <= row.high for row in judged)  # type: ignore[operator]
            self.text += f"; {held} of {len(judged)} intervals hold what they are compared with"


def _ratio(row: ComparedRow) -> float:
    return row.predicted / float(row.measured_or_published or 1.0)


def _beyond(row: ComparedRow, end: float | None) -> float:
    """Return how far an interval's end lies from the prediction, as a share of what it is compared with."""
    return 0.0 if end is None else abs(end - row.predicted) / float(row.measured_or_published or 1.0)
