"""The local correction: what a law leaves over, carried from measured sizes to those between them.

Ordinary kriging (the best linear unbiased guess, Cressie, Statistics for Spatial Data, 1993, section 3.2): the logs of
two ratios time / law are alike by exp(-sum |log2 size ratio| / octaves), a length per coordinate that the data teaches.
Between two knots of a full grid this is nearly a straight line in log size; where sizes are scattered it weighs
neighbours by every coordinate and sees that two of them on one side say the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from longcat_sim.ops.op import FloatArray

NEIGHBOURS = 20
"""Measured sizes that a guess is made from (products on a B200: 12 miss by 4.1 %, 20 by 3.9 %, 24 by 3.9 %)."""
BLOCK = 128
"""Targets solved at once: their matrices stay in a core's cache."""
TRIALS, FOLDS, FEW_TRIALS = 400, 3, 5
"""Points that lengths are tried on at once, each guessed from all the others; how often, on other points, where there
are fewer than five times as many: the lengths of one draw of a few hundred points are luck."""
FEW_POINTS = 20
"""With fewer points lengths are not learned."""
DEFAULT_OCTAVES, DEFAULT_NUGGET = 4.0, 0.05
"""Assumed where points are too few to tell: a few octaves, and a twentieth of the variance is noise."""
LENGTHS = (0.25, 64.0)
WORST = 0.5
"""A point that is off by more counts as this much when lengths are chosen, so that artefacts do not choose them."""
HALF_OCTAVES = 4.0
"""Half of the correction is left this far from every measured size, where only the law is known (assumed)."""

AT_CELL_OCTAVES = 0.01
"""A point this near to a cell is a measurement of it (sizes are whole numbers, cells are rounded to six digits)."""


class Smoothness(NamedTuple):
    """How the correction varies: octaves per coordinate over which it changes, and the share of it that is noise."""

    octaves: tuple[float, ...]
    nugget: float = DEFAULT_NUGGET
    is_turned: bool = False
    """Whether the coordinates are those of ``Law.turned``."""
    loss: float = np.inf
    """Mean error with which points were guessed from the others; infinite where they were too few to try."""


def logs(coordinates: Any) -> FloatArray:
    """Return log2 of the coordinates [N, D]; sizes below 1 count as half a unit."""
    return np.log2(np.maximum(np.stack(coordinates, axis=-1), 0.5))


def krige(points: FloatArray, values: FloatArray, targets: FloatArray, smooth: Smoothness) -> FloatArray:
    """Return the values guessed at ``targets`` [T, D] from those at ``points`` [N, D], both in octaves.

    Between the knots of a grid many targets have the same neighbours: their system is solved once.
    """
    from scipy.spatial import cKDTree

    lengths = np.array(smooth.octaves)
    points, targets = points / lengths, targets / lengths
    near = min(NEIGHBOURS, len(points))
    indices = cKDTree(points).query(targets, k=near, p=1)[1].reshape(-1, near)
    # a set of neighbours is known by the sum of its members' random numbers, whatever their order
    numbers = np.random.default_rng(0).integers(2**63, size=len(points), dtype=np.uint64)
    _, first, which = np.unique(numbers[indices].sum(1), return_index=True, return_inverse=True)
    # single precision: far finer than the steps in which a correction is kept, and twice as fast
    known, nugget = values.astype(np.float32), np.float32(smooth.nugget)
    axes = [axis.astype(np.float32) for axis in points.T]
    diagonal = np.arange(near)
    ones, data = np.empty((2, len(first), near), np.float32)
    for start in range(0, len(first), BLOCK):
        index = indices[first[start : start + BLOCK]]
        likeness = np.zeros((*index.shape, near), np.float32)
        apart = np.empty_like(likeness)
        for axis in axes:
            at = axis[index]
            np.subtract(at[:, :, None], at[:, None, :], out=apart)
            likeness -= np.abs(apart, out=apart)
        np.exp(likeness, out=likeness)
        likeness[:, diagonal, diagonal] += nugget
        solved = np.linalg.solve(likeness, np.stack([np.ones(index.shape, np.float32), known[index]], axis=-1))
        ones[start : start + BLOCK], data[start : start + BLOCK] = solved[..., 0], solved[..., 1]
    mean = data.sum(1) / ones.sum(1)
    data -= mean[:, None] * ones
    index = indices[first][which]
    weight = np.zeros(index.shape, np.float32)
    for axis, at in zip(axes, targets.T.astype(np.float32), strict=True):
        weight -= np.abs(axis[index] - at[:, None])
    return np.asarray(mean[which] + (np.exp(weight) * data[which]).sum(1), dtype=float)


def learn_smoothness(points: FloatArray, values: FloatArray, rng: np.random.Generator) -> Smoothness:
    """Return the lengths and the nugget that guess points best from the others, by search along one at a time."""
    dimensions = points.shape[1]
    smooth = Smoothness((DEFAULT_OCTAVES,) * dimensions)
    if len(values) < FEW_POINTS or not dimensions:
        return smooth
    rows = rng.permutation(len(values))
    size = min(TRIALS, len(values) // 5)
    trials = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
    trials = trials[: FOLDS if len(values) < FEW_TRIALS * TRIALS else 1]

    def loss(candidate: Smoothness, most: float = np.inf) -> float:
        """Return the mean error, or infinity as soon as it must exceed ``most``."""
        missed = 0.0
        for trial in trials:
            rest = np.ones(len(values), bool)
            rest[trial] = False
            guessed = krige(points[rest], values[rest], points[trial], candidate)
            missed += float(np.minimum(np.abs(guessed - values[trial]), WORST).mean())
            if missed > most * len(trials):
                return float("inf")
        return missed / len(trials)

    best = loss(smooth)
    for factors, nuggets in (((4.0, 0.25), (0.1, 10.0)), ((2.0, 0.5), (0.3, 3.0))):
        for axes in ((*range(dimensions),), *((axis,) for axis in range(dimensions))):
            for factor in factors:
                while True:
                    octaves = tuple(
                        float(np.clip(length * factor, *LENGTHS)) if axis in axes else length
                        for axis, length in enumerate(smooth.octaves)
                    )
                    candidate = smooth._replace(octaves=octaves)
                    found = loss(candidate, best) if octaves != smooth.octaves else best
                    if found >= best - 1e-5:
                        break
                    best, smooth = found, candidate
        for factor in nuggets:
            candidate = smooth._replace(nugget=smooth.nugget * factor)
            if (found := loss(candidate, best)) < best - 1e-5:
                best, smooth = found, candidate
    return smooth._replace(loss=best)


def correct(
    coordinates: tuple[FloatArray, ...], residual: FloatArray, cells: tuple[FloatArray, ...], smooth: Smoothness
) -> tuple[FloatArray, Any]:
    """Return the correction at each cell, and whether the cell was measured; its own points' mean, where it was.

    Far from every measured size it fades away and leaves the law.
    """
    from scipy.spatial import cKDTree

    points, targets = logs(coordinates), logs(cells)
    near, cell = cKDTree(targets).query(points, k=1, p=np.inf, distance_upper_bound=AT_CELL_OCTAVES)
    at_cell = np.isfinite(near)
    count = np.bincount(cell[at_cell], minlength=len(targets))
    total = np.bincount(cell[at_cell], weights=residual[at_cell], minlength=len(targets))
    measured = count > 0
    local = total / np.maximum(count, 1)
    varied = np.ptp(points, axis=0) > 0
    if not varied.any():
        return np.full(len(targets), np.median(residual)), measured
    lengths = smooth._replace(octaves=tuple(np.array(smooth.octaves)[varied].tolist()))
    between = ~measured
    if between.any():
        guessed = krige(points[:, varied], residual, targets[between][:, varied], lengths)
        away = cKDTree(points).query(targets[between], k=1, p=np.inf)[0]
        local[between] = guessed / (1.0 + (np.maximum(away, 0.05) / HALF_OCTAVES) ** 3)
    return local, measured
