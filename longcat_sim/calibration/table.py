"""``TimeTable``: times on a grid of sizes, read back by multilinear interpolation, never falling as a size grows.

Linear in every size, because kernels are: a product of m, n and k is exactly multilinear, a logarithmic interpolation
would bend it. Beyond the measured sizes knots of the law carry on, to a thousand times the largest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

from longcat_sim.ops.op import FloatArray

LARGEST_STEP = 2.0
"""Knots are at most this factor apart, so that a straight line between two stays close to the law's curve."""
LONGEST = 4.0
"""Octaves: an axis along which the correction changes more slowly keeps as many knots as one of this length."""
KNOT_DIGITS = 6
"""Fewer than a fit file keeps of a knot (8), so that no two knots become one there."""
BELOW, ABOVE = (1 / 16, 1 / 4), (4.0, 16.0, 64.0, 256.0, 1024.0)
"""Knots beyond the measured range, as factors of its ends: there the law rules."""
ROUNDS, EXACT = 6, 0.01
"""Of fitting rising times; a time that is off by less than a percent counts as met."""
FROM_NOTHING = tuple(4.0**i for i in range(1, 11))
"""Knots of a size that was measured at 0 only, such as the tokens before a prompt's chunk: up to a million."""


def thin(values: Sequence[FloatArray], max_cells: int, octaves: Sequence[float] | None = None) -> list[FloatArray]:
    """Return the axes with knots dropped, closest (in log) first, until the grid has at most ``max_cells`` cells.

    Closeness is measured in ``octaves``, the length over which times change beside the law, per axis.
    Knots keep ``KNOT_DIGITS`` digits: sizes that differ by less, such as expected numbers of active experts close to
    all of them, are one knot.
    """
    axes = [np.unique([float(f"{size:.{KNOT_DIGITS}g}") for size in np.unique(axis)]) for axis in values]
    while np.prod([len(axis) for axis in axes]) > max_cells:
        gaps = []
        for index, axis in enumerate(axes):
            if len(axis) > 4:
                logs = np.log2(np.maximum(axis, 0.5))
                spans = (logs[2:] - logs[:-2]) / (1.0 if octaves is None else min(octaves[index], LONGEST))
                at = int(np.argmin(spans))
                gaps.append((spans[at], -len(axis), index, at + 1))
        if not gaps:
            break
        _, _, index, at = min(gaps)
        axes[index] = np.delete(axes[index], at)
    return axes


def refine(axis: FloatArray) -> FloatArray:
    """Return the axis with knots between those more than ``LARGEST_STEP`` apart and beyond both ends."""
    inner = [axis[0]]
    for low, high in pairwise(axis.tolist()):
        start = low if low > 0 else max(high / 64, min(1.0, high / 2))
        if low <= 0:
            inner.append(start)
        pieces = int(np.ceil(np.log(high / start) / np.log(LARGEST_STEP) - 1e-9)) if high > start else 0
        inner += [start * (high / start) ** (i / pieces) for i in range(1, pieces)]
        inner.append(high)
    below = [axis[0] * factor for factor in BELOW if axis[0] > 0]
    above = [axis[-1] * factor for factor in ABOVE] if axis[-1] > 0 else list(FROM_NOTHING)
    return np.unique(np.array([*below, *inner, *above]))


def rising(values: FloatArray) -> FloatArray:
    """Return a fit to ``values`` (logs) that rises along every axis and is off by little in the mean absolute error.

    Some kernels do fall as a size grows; what that costs is the error named ``fitted`` of a law (B200: products 2.4 %,
    MLA 1.6 %, experts in nvfp4 4.8 %; H100: products 1.0, MLA 1.5 %). Least squares would bend many good times for one
    bad one: it is repeated with weights against what it missed (iteratively reweighted least squares).
    """
    axes = range(values.ndim)
    weights = np.ones_like(values)
    for _ in range(ROUNDS):
        fits = []
        for order in (axes, reversed(axes)):
            fit = values
            for axis in order:
                fit = _isotonic(fit, weights, axis)
            fits.append(fit)
        fit = (fits[0] + fits[1]) / 2
        weights = 1.0 / np.maximum(np.abs(fit - values), EXACT)
    # with weights, one axis can spoil what another has mended: between both running extremes lies a rising fit
    return (raised(fit) - np.flip(raised(-np.flip(fit)))) / 2


def _isotonic(values: FloatArray, weights: FloatArray, axis: int) -> FloatArray:
    """Return the least-squares rising fit along one axis, each lane by itself."""
    from scipy.optimize import isotonic_regression

    moved = np.moveaxis(values, axis, -1)
    lanes = moved.reshape(-1, moved.shape[-1])
    # one call for all lanes: each lies so far above the last that they never touch
    lift = (np.ptp(lanes) + 1.0) * np.arange(len(lanes))[:, None]
    fit = isotonic_regression((lanes + lift).ravel(), weights=np.moveaxis(weights, axis, -1).ravel()).x
    return np.moveaxis((fit.reshape(lanes.shape) - lift).reshape(moved.shape), -1, axis)


def raised(values: FloatArray) -> FloatArray:
    """Return ``values`` lifted to their running maximum along every axis: rising whatever they were."""
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


class TimeTable:
    """Times on a rectilinear grid."""

    def __init__(self, axes: Sequence[FloatArray], values: FloatArray) -> None:
        self.axes = [np.ascontiguousarray(axis, dtype=float) for axis in axes]
        self.values = raised(np.asarray(values, dtype=float))
        self._flat = self.values.ravel()
        self._strides = [int(np.prod(self.values.shape[i + 1 :])) for i in range(self.values.ndim)]
        self._lists = [axis.tolist() for axis in self.axes]
        self._fast: list[float] | None = None
        self._corners: list[int] = []

    def many(self, points: Sequence[FloatArray]) -> FloatArray:
        """Return the times at ``points`` (one array per axis) [N]; sizes are clipped to the grid."""
        base = np.zeros(len(points[0]), dtype=np.intp)
        shares, steps = [], []
        for axis, stride, at in zip(self.axes, self._strides, points, strict=True):
            if len(axis) == 1:
                continue
            index = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
            low = axis[index]
            shares.append(np.clip((at - low) / (axis[index + 1] - low), 0.0, 1.0))
            steps.append(stride)
            base += index * stride
        total = np.zeros(len(base))
        for corner in product((0, 1), repeat=len(steps)):
            weight: FloatArray | float = 1.0
            offset = 0
            for bit, share, step in zip(corner, shares, steps, strict=True):
                weight = weight * (share if bit else 1.0 - share)
                offset += bit * step
            total += weight * self._flat[base + offset]
        return total

    def one(self, point: Sequence[float]) -> float:
        """Return the time at one point; the same as ``many``, without arrays."""
        if self._fast is None:
            self._fast = self._flat.tolist()
            varied = [stride for axis, stride in zip(self.axes, self._strides, strict=True) if len(axis) > 1]
            self._corners = [sum(step) for step in product(*((0, stride) for stride in varied))]
        base = 0
        shares = []
        for axis, stride, at in zip(self._lists, self._strides, point, strict=True):
            last = len(axis) - 2
            if last < 0:
                continue
            index = min(max(bisect_right(axis, at) - 1, 0), last)
            low = axis[index]
            shares.append(min(max((at - low) / (axis[index + 1] - low), 0.0), 1.0))
            base += index * stride
        fast = self._fast
        values = [fast[base + step] for step in self._corners]
        for share in reversed(shares):  # the last axis varies fastest
            values = [low + (high - low) * share for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]
