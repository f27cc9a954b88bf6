"""``Section``: one table of predictions beside published or measured results; text and JSON come from it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One quantity: what was predicted, what it is compared with, and the limit that the error must keep."""

    quantity: str
    unit: str
    predicted: float
    measured_or_published: float | None = None
    error: float | None = None
    """Signed and relative unless ``error_unit`` says otherwise; found from the two figures where not given."""
    limit: float | None = None
    """Largest |error| that passes; None: the row is printed, not judged."""
    passed: bool | None = None
    note: str = ""
    low: float | None = None
    """5th percentile of the prediction."""
    high: float | None = None
    """95th percentile of the prediction."""

    def __post_init__(self) -> None:
        if self.error is None and self.measured_or_published:
            object.__setattr__(self, "error", self.predicted / self.measured_or_published - 1)
        if self.passed is None and self.limit is not None and self.error is not None:
            object.__setattr__(self, "passed", abs(self.error) <= self.limit)


LEAST_WIDTH, MOST_WIDTH = 46, 64
"""Of the first column, in characters."""
SCREEN = 40
"""Rows of a table beyond which those that missed their limit are named again at its end."""


@dataclass
class Section:
    """A named table. ``passed`` is None where no row has a limit."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why nothing could be run, such as missing data."""

    @property
    def passed(self) -> bool | None:
        """Whether every judged row keeps its limit."""
        judged = [row.passed for row in self.rows if row.passed is not None]
        return all(judged) if judged else None

    def to_json(self) -> dict[str, Any]:
        """Return the section as plain data."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """Return the table for people."""
        lines = [self.title, "-" * len(self.title)]
        if self.skipped:
            lines.append(f"skipped: {self.skipped}")
        width = min(MOST_WIDTH, max([LEAST_WIDTH, *(len(row.quantity) for row in self.rows)]))
        if self.rows:
            lines.append(_line(width, "quantity", "unit", "predicted", "compared with", "error", "limit", ""))
        for row in self.rows:
            shown = f"{row.predicted:.4g}"
            if row.low is not None and row.high is not None:
                shown += f" [{row.low:.4g}, {row.high:.4g}]"
            against = "" if row.measured_or_published is None else f"{row.measured_or_published:.4g}"
            error = "" if row.error is None else f"{row.error:+.1%}"
            limit = "" if row.limit is None else f"{row.limit:.1%}"
            verdict = {True: "ok", False: "MISSED", None: ""}[row.passed]
            note = f"{verdict} {row.note}".strip()
            lines.append(_line(width, row.quantity, row.unit, shown, against, error, limit, note))
        judged = [row.passed for row in self.rows if row.passed is not None]
        if judged:
            lines.append(f"{sum(judged)} of {len(judged)} rows with a limit keep it")
        missed = [row for row in self.rows if row.passed is False and row.error is not None]
        if missed and len(self.rows) > SCREEN:
            lines += ["missed:", *(f"  {row.quantity}: {_against_limit(row)}" for row in missed)]
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        cells = []
        for row in self.rows:
            shown = f"{row.predicted:.4g}"
            if row.low is not None and row.high is not None:
                shown += f" [{row.low:.4g}, {row.high:.4g}]"
            against = "" if row.measured_or_published is None else f"{row.measured_or_published:.4g}"
            numbers = (shown, against, "" if row.error is None else f"{row.error:+.1%}",
                       "" if row.limit is None else f"{row.limit:.1%}")  # fmt: skip
            verdict = {True: "ok", False: "<b>missed</b>", None: ""}[row.passed]
            cells.append(
                f"<tr><td style='text-align:left'>{html.escape(row.quantity)}</td><td>{html.escape(row.unit)}</td>"
                + "".join(f"<td style='text-align:right'>{number}</td>" for number in numbers)
                + f"<td style='text-align:left'>{verdict} {html.escape(row.note)}</td></tr>"
            )
        heads = ("quantity", "unit", "predicted", "compared with", "error", "limit", "")
        head = "".join(f"<th>{name}</th>" for name in heads)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        skipped = f"<p>Skipped: {html.escape(self.skipped)}</p>" if self.skipped else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>" if cells else ""
        return f"<h4>{html.escape(self.title)}</h4>{skipped}{table}{notes}"


def _against_limit(row: Row) -> str:
    """Return the error, and its limit where there is one."""
    return f"{row.error:+.1%}" + ("" if row.limit is None else f", limit {row.limit:.1%}")


def _line(width: int, quantity: str, unit: str, predicted: str, against: str, error: str, limit: str, note: str) -> str:
    figures = f"{unit:<12.12} {predicted:>24} {against:>13} {error:>8} {limit:>6}"
    return f"{quantity:<{width}.{width}} {figures}  {note}".rstrip()


def worst(rows: Sequence[Row]) -> float:
    """Return the largest |error| of the rows."""
    return max((abs(row.error) for row in rows if row.error is not None), default=0.0)


def median(rows: Sequence[Row]) -> float:
    """Return the median |error| of the rows."""
    errors = sorted(abs(row.error) for row in rows if row.error is not None)
    if not errors:
        return 0.0
    middle = len(errors) // 2
    return errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
