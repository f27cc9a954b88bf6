"""How long does one op take here: measured points, the fitted law, and the data sheet, along one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from longcat_sim.errors import CapacityError
from longcat_sim.ops.op import KINDS, Op, OpArrays, OpTimesLike
from longcat_sim.panels.base import Control, Panel
from longcat_sim.records.measurement import Measurement

MIN_POINTS, MOST_FAMILIES, CURVE_POINTS = 3, 24, 40


class FittedTimes(OpTimesLike, Protocol):
    """Op times that know their error."""

    def interval(self, op: Op, level: float = 0.9) -> tuple[float, float]:
        """Return the interval that holds the measured time with probability ``level``."""
        ...


def families(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Return measurements that differ only in their first size (rows, batch, ..) by name, largest families first."""
    found: dict[tuple[Any, ...], list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.alongside is None and not row.op.is_collective and row.op.kind != "host":
            found[row.op.kind, row.op.dtype, row.op.variant, row.op.sizes[1:]].append(row)
    many = [group for group in found.values() if len({row.op.sizes[0] for row in group}) >= MIN_POINTS]
    many.sort(key=lambda group: (-len(group), -max(row.median_s for row in group)))
    return {_name(group[0].op): sorted(group, key=lambda row: row.op.sizes[0]) for group in many[:MOST_FAMILIES]}


def _name(item: Op) -> str:
    sizes = ", ".join(f"{name} {size:g}" for name, size in list(item.dims.items())[1:])
    return f"{item.kind} {item.dtype}" + (f" ({sizes})" if sizes else "")


class OpTimesPanel(Panel):
    """Time against the first size of one op; the slider asks for a size that need not have been measured."""

    def __init__(self, op_times: FittedTimes, sheet: OpTimesLike, rows: Iterable[Measurement]) -> None:
        self.op_times, self.sheet = op_times, sheet
        self.families = families(rows)
        if not self.families:
            raise CapacityError(
                f"rows: expected measurements of one op at {MIN_POINTS} or more sizes; got none; profile more suites"
            )
        first = next(iter(self.families))
        sizes = [row.op.sizes[0] for group in self.families.values() for row in group]
        top = max(sizes) * 4
        super().__init__([
            Control("op", "op", first, choices=tuple(self.families)),
            Control("size", "its first size", min(24.0, top), 1.0, top, is_log=True),
        ])  # fmt: skip

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        figure.add_scatter(x=[], y=[], mode="lines", name="data sheet", line={"color": "#8a94a3", "dash": "dot"})
        figure.add_scatter(x=[], y=[], mode="lines", name="fitted", line={"color": "#2a6f97", "width": 2})
        figure.add_scatter(
            x=[], y=[], mode="markers", name="measured", marker={"size": 8, "color": "#edae49"},
            error_y={"type": "data", "symmetric": False, "array": [], "arrayminus": [], "thickness": 1},
        )  # fmt: skip
        figure.add_scatter(
            x=[], y=[], mode="markers", name="asked", marker={"size": 14, "symbol": "star", "color": "#d1495b"},
            error_y={"type": "data", "symmetric": False, "array": [], "arrayminus": []},
        )  # fmt: skip
        figure.update_layout(
            height=420, margin={"l": 10, "r": 10, "t": 30, "b": 8},
            xaxis={"type": "log"}, yaxis={"type": "log", "title": "µs"},
        )  # fmt: skip
        return figure

    def _op(self, size: float) -> Op:
        like = self.families[self.values["op"]][0].op
        return Op(like.kind, (float(size), *like.sizes[1:]), like.dtype, like.variant)

    def _many(self, times: OpTimesLike, sizes: np.ndarray) -> np.ndarray:
        like = self._op(1.0)
        dims = {name: np.full(len(sizes), size) for name, size in like.dims.items()}
        dims[KINDS[like.kind].dims[0]] = sizes
        return times.seconds_many(OpArrays(like.kind, dims, like.dtype, like.variant)) * 1e6

    def _update(self) -> None:
        group, size = self.families[self.values["op"]], round(self.values["size"])
        measured = np.array([row.op.sizes[0] for row in group])
        grid = np.geomspace(min(measured.min(), size), max(measured.max() * 2, size), CURVE_POINTS)
        sheet, fitted, points, asked = self.figure.data
        sheet.x, sheet.y = grid, self._many(self.sheet, grid)
        fitted.x, fitted.y = grid, self._many(self.op_times, grid)
        points.x, points.y = measured, [row.median_s * 1e6 for row in group]
        points.error_y.array = [(row.p90_s - row.median_s) * 1e6 for row in group]
        points.error_y.arrayminus = [(row.median_s - row.p10_s) * 1e6 for row in group]
        one = self._op(size)
        seconds, (low, high) = self.op_times.seconds(one), self.op_times.interval(one)
        asked.x, asked.y = [size], [seconds * 1e6]
        asked.error_y.array, asked.error_y.arrayminus = [(high - seconds) * 1e6], [(seconds - low) * 1e6]
        name = KINDS[one.kind].dims[0]
        self.figure.layout.xaxis.title.text = name
        self.text = (
            f"{name} {size:g}: {seconds * 1e6:.3g} µs, 90 % interval {low * 1e6:.3g} to {high * 1e6:.3g}, "
            f"{seconds / self.sheet.seconds(one):.2g} times the data sheet; {self.op_times.tag(one)}"
        )
