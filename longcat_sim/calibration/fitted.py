"""``FittedLaw``: one op kind in one precision, fitted: the law's weights, the local correction, and its held-out error.

The weights come from ``weights.weigh``, the correction from the residuals of measured sizes, kriged onto a grid; the
time on the grid is then made to rise with every size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from longcat_sim.calibration.laws import LAWS, Device
from longcat_sim.calibration.local import Smoothness, correct, learn_smoothness, logs
from longcat_sim.calibration.table import TimeTable, refine, rising, thin
from longcat_sim.calibration.weights import law_seconds, weigh, weigh_again
from longcat_sim.ops.op import FloatArray, Tag

LEVELS: FloatArray = np.linspace(0.0, 1.0, 21)
"""Probabilities at which the held-out residuals are kept."""
FIT_ROWS = 4000
"""Rows that a law's few weights are fitted to; the correction uses all."""
NEAR_OCTAVES = 1.5
"""A size further than this from every measured one, in any coordinate, is extrapolated."""


@dataclass
class FittedLaw:
    """The fit of one (kind, dtype, variant). Fields end in ``_`` where the data taught them."""

    kind: str
    dtype: str
    variant: str
    reference: Device
    """The data sheet it was fitted against."""
    weights_: FloatArray
    axes_: list[FloatArray]
    """Sizes of the correction grid, per coordinate."""
    correction_: FloatArray
    """log(time / law) on the grid."""
    measured_: Any
    """Whether a cell of the grid was measured."""
    count_: int
    draws_: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    """Weights of the bootstrap draws [draws, weights]."""
    residuals_: Mapping[str, FloatArray] = field(default_factory=dict)
    """Split class (interpolated, extrapolated) -> quantiles of log(measured / predicted) at ``LEVELS``."""
    correlation_: float = 0.0
    """Correlation of held-out residuals between neighbouring sizes."""
    errors_: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Split -> mape, median, p90, count, coverage."""
    provenance: tuple[str, ...] = ()
    transferred_from: str = ""
    """Another device that was measured instead of this one."""
    smooth_: Smoothness | None = None
    """How the correction varies with size; known right after a fit only."""

    @property
    def key(self) -> tuple[str, str, str]:
        """(kind, dtype, variant)."""
        return self.kind, self.dtype, self.variant

    def quantiles(self, tag: Tag) -> FloatArray:
        """Return the quantiles of log(measured / predicted) at ``LEVELS`` for predictions with ``tag``."""
        found = self.residuals_.get("extrapolated" if tag == "extrapolated" else "interpolated")
        return np.zeros(len(LEVELS)) if found is None else found

    @classmethod
    def fit(
        cls, key: tuple[str, str, str], coordinates: tuple[FloatArray, ...], seconds: FloatArray, device: Device, *,
        max_cells: int = 6000, rng: np.random.Generator, smooth: Smoothness | None = None,
    ) -> FittedLaw:  # fmt: skip
        """Return the law and its correction for measured ``seconds`` at ``coordinates``.

        How smooth the correction is (a length per coordinate) is learned from the points unless given.
        """
        kind, dtype, variant = key
        rows = np.arange(len(seconds))
        if len(rows) > FIT_ROWS:
            rows = rng.choice(rows, FIT_ROWS, replace=False)
        weights = weigh(tuple(c[rows] for c in coordinates), seconds[rows], kind, dtype, device)
        residual = np.log(seconds / law_seconds(weights, coordinates, kind, dtype, device))
        smooth = smooth or _smoothness(kind, coordinates, residual, rng)
        axes = thin(coordinates, max_cells, smooth.octaves)
        grid = np.meshgrid(*axes, indexing="ij")
        cells = tuple(part.ravel() for part in grid)
        turned = LAWS[kind].turned if smooth.is_turned else None
        near, sought = (coordinates, cells) if turned is None else (turned(coordinates), turned(cells))
        local, measured = correct(near, residual, sought, smooth)
        law_grid = law_seconds(weights, cells, kind, dtype, device)
        times = rising(np.log(law_grid * np.exp(local)).reshape(grid[0].shape))
        correction = times - np.log(law_grid).reshape(times.shape)
        return cls(
            kind,
            dtype,
            variant,
            device,
            weights,
            axes,
            correction,
            measured.reshape(times.shape),
            len(seconds),
            smooth_=smooth,
        )

    def bootstrap(
        self, coordinates: tuple[FloatArray, ...], seconds: FloatArray, draws: int, rng: np.random.Generator
    ) -> None:
        """Fit the weights again on ``draws`` resamples of the points."""
        rows = np.arange(len(seconds))
        if len(rows) > FIT_ROWS // 4:
            rows = rng.choice(rows, FIT_ROWS // 4, replace=False)
        part = tuple(c[rows] for c in coordinates)
        counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws).astype(float)
        self.draws_ = weigh_again(self.weights_, part, seconds[rows], self.kind, self.dtype, self.reference, counts)

    def table(self, device: Device, dtype: str | None = None, upto: Sequence[float] | None = None) -> TimeTable:
        """Return the times on ``device`` (scaled by the law where it differs from the reference) as a grid.

        Where the largest sizes to be read are given (``upto``, one per coordinate), it ends there.
        """
        axes = [refine(axis) for axis in self.axes_]
        if upto is not None:
            axes = [axis[: np.searchsorted(axis, most) + 1] for axis, most in zip(axes, upto, strict=True)]
        cells = tuple(part.ravel() for part in np.meshgrid(*axes, indexing="ij"))
        shape = tuple(len(axis) for axis in axes)
        law = law_seconds(self.weights_, cells, self.kind, dtype or self.dtype, device)
        return TimeTable(axes, law.reshape(shape) * np.exp(self._correction_on(axes)))

    def _correction_on(self, axes: Sequence[FloatArray]) -> FloatArray:
        """Return the correction on a grid, between and beyond its knots: linear in log sizes, one axis at a time."""
        values = self.correction_
        for number, (knots, sizes) in enumerate(zip(self.axes_, axes, strict=True)):
            if len(knots) == 1:
                values = np.repeat(values, len(sizes), axis=number)
                continue
            known, at = np.log2(np.maximum(knots, 0.25)), np.log2(np.maximum(sizes, 0.25))
            place = np.interp(at, known, np.arange(len(known)))
            low = np.minimum(place.astype(int), len(known) - 2)
            share = (place - low).reshape([-1 if axis == number else 1 for axis in range(values.ndim)])
            values = np.take(values, low, number) * (1 - share) + np.take(values, low + 1, number) * share
        return values

    @cached_property
    def _measured_tree(self) -> Any:
        """Tree of the measured cells in log sizes."""
        from scipy.spatial import cKDTree

        cells = np.meshgrid(*self.axes_, indexing="ij")
        found = logs(tuple(part[self.measured_] for part in cells))
        return cKDTree(found) if len(found) else None

    def tags(self, coordinates: tuple[FloatArray, ...]) -> list[Tag]:
        """Return where each prediction comes from."""
        if self._measured_tree is None:
            return ["extrapolated"] * len(coordinates[0])
        points = logs(coordinates)
        inside = np.ones(len(points), bool)
        for at, axis in zip(coordinates, self.axes_, strict=True):
            inside &= (at >= axis[0] * (1 - 1e-6)) & (at <= axis[-1] * (1 + 1e-6))
        distance = self._measured_tree.query(points, k=1, p=np.inf)[0]
        best: Tag = "interpolated" if self.transferred_from else "measured"
        return [
            "extrapolated" if not ok or far > NEAR_OCTAVES else best if far < 0.02 else "interpolated"
            for ok, far in zip(inside, distance, strict=True)
        ]


def _smoothness(
    kind: str, coordinates: tuple[FloatArray, ...], residual: FloatArray, rng: np.random.Generator
) -> Smoothness:
    """Return how the correction varies, in the law's coordinates or in its turned ones, where points follow better from
    each other there."""
    turned = LAWS[kind].turned
    if turned is None:
        return _lengths(coordinates, residual, rng)
    seed = int(rng.integers(2**32))  # both are tried on the same points
    plain, other = (_lengths(way, residual, np.random.default_rng(seed)) for way in (coordinates, turned(coordinates)))
    return other._replace(is_turned=True) if other.loss < plain.loss else plain


def _lengths(coordinates: tuple[FloatArray, ...], residual: FloatArray, rng: np.random.Generator) -> Smoothness:
    """Return how the correction varies; coordinates with one value get any length."""
    points = logs(coordinates)
    varied = np.ptp(points, axis=0) > 0
    learned = learn_smoothness(points[:, varied], residual, rng)
    lengths = np.ones(len(varied))
    lengths[varied] = learned.octaves
    return learned._replace(octaves=tuple(lengths.tolist()))
