"""The quickstart's report: one HTML file with everything inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_sim.calibration import OpTimes
from longcat_sim.figures.prediction import prediction_figure
from longcat_sim.figures.report import Report
from longcat_sim.records.files import write_text
from longcat_sim.records.measurement import Measurement
from longcat_sim.studies.validate.section import Row, Section

if TYPE_CHECKING:
    from longcat_sim.studies.quickstart.run import Quickstart

IN_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3}
"""Units of time in tables -> factor to ms."""
COLUMNS = ("quantity", "unit", "predicted", "measured or published", "error", "limit", "")


def _cells(row: Row) -> tuple[str, ...]:
    predicted = f"{row.predicted:.4g}"
    if row.low is not None and row.high is not None:
        predicted += f" [{row.low:.4g}, {row.high:.4g}]"
    verdict = {True: "ok", False: "missed", None: ""}[row.passed]
    return (
        row.quantity,
        row.unit,
        predicted,
        "" if row.measured_or_published is None else f"{row.measured_or_published:.4g}",
        "" if row.error is None else f"{row.error:+.1%}",
        "" if row.limit is None else f"{row.limit:.1%}",
        f"{verdict} {row.note}".strip(),
    )


def add_section(report: Report, section: Section) -> None:
    """Add a section's table and notes."""
    report.heading(section.title)
    if section.skipped:
        report.text(f"Skipped: {section.skipped}")
    if section.rows:
        report.table(COLUMNS, [_cells(row) for row in section.rows], numbers=(2, 3, 4, 5))
    for note in section.notes:
        report.text(note, note=True)


def write_report(result: Quickstart, rows: Sequence[Measurement], path: Path) -> None:
    """Write the report."""
    environment = result.op_times.hardware
    report = Report("longcat_sim: measured here, simulated there")
    report.text(
        f"Measured on {environment.device}. {result.measured}. Every prediction stands beside a measurement of this "
        "machine that its fit has not seen, or beside a published figure that nothing is fitted to."
    )
    for section in result.sections:
        add_section(report, section)
        if section.name == "check-1-ops":
            report.figure(ops_figure(result.op_times, rows), height=480)
        if section.name == "check-2-steps":
            report.figure(sections_figure([section], "Steps of the executable model"), height=480)
        if section.name == "longcat-128-h800":
            report.figure(result.step.figure())
        if section.name == "price":
            report.figure(result.serving.figure(), height=480)
    report.heading("Where the time of a decode step goes")
    parts = result.step.step.breakdown.parts()
    total = sum(parts.values())
    report.table(
        ("part", "ms", "share"),
        [(name, f"{seconds * 1e3:.3f}", f"{seconds / total:.1%}") for name, seconds in parts.items()],
        numbers=(1, 2),
    )
    for note in result.step.notes:
        report.text(note, note=True)
    write_text(path, report.html())


def ops_figure(op_times: OpTimes, rows: Iterable[Measurement]) -> Any:
    """Return fitted op times against measurements of ops alone."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row.alongside is None and row.op.kind != "host":
            predicted = op_times.seconds(row.op)
            points.setdefault(row.op.kind, []).append((row.median_s * 1e6, predicted * 1e6, str(row.op)))
    return prediction_figure(points, title="Fitted op times against measurements", unit="µs")


def sections_figure(sections: Sequence[Section], title: str) -> Any:
    """Return every time in the sections' tables beside what it is compared with, in ms.

    A series per section; of one section alone, a series per first word of its quantities.
    """
    points: dict[str, list[tuple[float, float, str]]] = {}
    for section in sections:
        for row in section.rows:
            factor = IN_MS.get(row.unit)
            if factor and row.measured_or_published:
                series = section.title.split(",")[0] if len(sections) > 1 else row.quantity.split()[0]
                point = (row.measured_or_published * factor, row.predicted * factor, row.quantity)
                points.setdefault(series, []).append(point)
    figure = prediction_figure(points, title=title, unit="ms")
    return figure.update_layout(legend={"orientation": "h", "y": -0.2})
