"""Tables of a layer profile: CSV rows with their faults, and curves with straight lines between the points."""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from longcat_sim.errors import MeasurementError

Curve = tuple[Sequence[float], Sequence[float]]
"""(ascending nodes, values)"""


def bracket(nodes: Sequence[float], x: float) -> tuple[int, float]:
    """Return (index of the lower node, weight of the upper one); beyond the ends the weight leaves 0..1."""
    if len(nodes) == 1:
        return 0, 0.0
    j = min(max(bisect_right(nodes, x) - 1, 0), len(nodes) - 2)
    return j, (x - nodes[j]) / (nodes[j + 1] - nodes[j])


def interpolate(curve: Curve, x: float) -> float:
    """Return the piecewise linear value at ``x``; below the first node its value, above the last its last slope."""
    nodes, values = curve
    if x <= nodes[0] or len(nodes) == 1:
        return values[0]
    j, weight = bracket(nodes, x)
    return values[j] + (values[j + 1] - values[j]) * weight


def curve(points: Mapping[float, float]) -> Curve:
    """Return the curve through (node, value) pairs."""
    nodes = sorted(points)
    return nodes, [points[node] for node in nodes]


@dataclass(frozen=True)
class CurveFamily:
    """Curves measured at several values of a parameter; straight lines between these, too."""

    parameters: list[float]
    curves: dict[float, Curve]

    @classmethod
    def of(cls, points: Mapping[float, Mapping[float, float]]) -> CurveFamily:
        """Return the family of parameter -> node -> value."""
        return cls(sorted(points), {parameter: curve(row) for parameter, row in points.items()})

    def at(self, parameter: float, x: float) -> float:
        """Return the value; the parameter is held within what was measured."""
        known = self.parameters
        j, weight = bracket(known, min(max(parameter, known[0]), known[-1]))
        low = interpolate(self.curves[known[j]], x)
        return low if not weight else low + (interpolate(self.curves[known[j + 1]], x) - low) * weight


Row = tuple[str, list[str]]
"""("file:line", cells)"""


def table_rows(path: Path, columns: Sequence[Sequence[str]]) -> list[Row]:
    """Return the named columns of a CSV file; each may have several names, the first that is there counts.

    Raises:
        MeasurementError: the file or a column is missing, or it is no CSV text.
    """
    lines = _cells(path)
    if not lines:
        raise MeasurementError(f"{path}: expected a profile table; there is no such file; is this a profile folder?")
    header = lines[0][1]
    if not header:
        raise MeasurementError(f"{path}:1: expected a profile table; got an empty file; copy or measure it anew")
    at = []
    for names in columns:
        found = next((name for name in names if name in header), None)
        if found is None:
            raise MeasurementError(
                f"{path}:1: expected a column {' or '.join(names)}; got {', '.join(header)}; is this that table?"
            )
        at.append(header.index(found))
    rows = []
    for where, row in lines[1:]:
        if row and len(row) <= max(at):
            raise MeasurementError(f"{where}: expected {len(header)} values; got {len(row)}; mend it")
        if row:
            rows.append((where, [row[i] for i in at]))
    return rows


def table_header(path: Path) -> list[str]:
    """Return the columns of a CSV file; none if there is no such file.

    Raises:
        MeasurementError: it is no CSV text.
    """
    lines = _cells(path)
    return lines[0][1] if lines else []


def _cells(path: Path) -> list[Row]:
    """Return the rows of a CSV file, its header first; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            return [(f"{path}:{reader.line_num}", row) for row in reader] or [(f"{path}:1", [])]
    except (UnicodeDecodeError, csv.Error) as fault:
        raise MeasurementError(f"{path}: expected a CSV table, UTF-8 text; got {fault}; export it anew") from None


def numbers(where: str, row: Sequence[str]) -> list[float]:
    """Return the values of a row.

    Raises:
        MeasurementError: one of them is no finite number.
    """
    try:
        values = [float(value) for value in row]
    except ValueError:
        values = [float("nan")]
    if not all(isfinite(v) for v in values):
        raise MeasurementError(f"{where}: expected numbers; got {', '.join(row)!r}; mend the row")
    return values


def timed(where: str, row: Sequence[str], num_times: int = 1) -> list[float]:
    """Return sizes, and the times in us that end the row.

    Raises:
        MeasurementError: one is no number, a size is negative, or a time not positive.
    """
    values = numbers(where, row)
    if min(values[-num_times:]) <= 0:
        raise MeasurementError(f"{where}: expected a time above 0 us; got {', '.join(row)!r}; measure the row anew")
    if min(values) < 0:
        raise MeasurementError(f"{where}: expected sizes of 0 or more; got {', '.join(row)!r}; mend the row")
    return values
