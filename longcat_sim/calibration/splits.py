"""Held-out error of a law on three splits, and the residuals from which its intervals come.

Splits: ``random`` (a fifth, five times over), ``largest`` (the 15 % of points with most work), ``dimension`` (one whole
value of each coordinate). Beside them ``fitted`` is the error on the points that were fitted: where a kernel gets
faster as a size grows, times here, which never fall, must differ. ``random p10`` is ``random`` with the 10th
percentiles of the measured times in place of their medians, fitted and held out alike.

Intervals use the quantiles of held-out residuals (split conformal), beyond the measured sizes the widest of all three
splits'. Their coverage is checked on points that neither the fit nor the quantiles saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longcat_sim.calibration.fitted import LEVELS, FittedLaw
from longcat_sim.calibration.laws import LAWS
from longcat_sim.calibration.local import logs
from longcat_sim.ops.op import FloatArray

FOLDS = 5
LARGEST_SHARE = 0.15
LEVEL = 0.9
MIN_TRAIN = 4


def judge(
    law: FittedLaw,
    coordinates: tuple[FloatArray, ...],
    seconds: FloatArray,
    *,
    rng: np.random.Generator,
    max_cells: int,
    p10: FloatArray | None = None,
) -> None:
    """Fill in ``errors_``, ``residuals_`` and ``correlation_`` of a fitted law.

    ``p10`` are the 10th percentiles of times that were measured here; a table has none.

    Every split has weights and a correction of its own; only the correction's lengths (one per coordinate, and a
    nugget) are those that all points taught.
    """
    device = law.reference

    def residual(test: Any, times: FloatArray = seconds) -> FloatArray:
        train = ~test
        fitted = FittedLaw.fit(
            law.key, tuple(c[train] for c in coordinates), times[train], device, max_cells=max_cells, rng=rng,
            smooth=law.smooth_,
        )  # fmt: skip
        asked = [c[test] for c in coordinates]
        predicted = fitted.table(device, upto=[float(sizes.max()) for sizes in asked]).many(asked)
        return np.log(times[test] / predicted)

    fold = rng.permutation(len(seconds)) % FOLDS
    inside = np.zeros(len(seconds))
    for number in range(FOLDS):
        inside[fold == number] = residual(fold == number)
    law.correlation_ = neighbour_correlation(coordinates, inside)

    errors = {"random": _by_folds(inside, fold)}
    if p10 is not None:
        lowest = np.zeros(len(seconds))
        for number in range(FOLDS):
            lowest[fold == number] = residual(fold == number, p10)
        errors["random p10"] = _by_folds(lowest, fold)
    largest, dimension = largest_split(law.kind, coordinates), dimension_splits(coordinates)
    parts = {"largest": [largest] if largest is not None else [], "dimension": dimension}
    parts = {name: [test for test in tests if (~test).sum() >= MIN_TRAIN] for name, tests in parts.items()}
    found = {name: [residual(test) for test in tests] for name, tests in parts.items()}
    pieces = [piece for name in found for piece in found[name]]
    for name, own in found.items():
        if own:  # each piece against the interval made of the other pieces and of the points outside it
            tests = zip(own, parts[name], strict=True)
            others = [[inside[~test], *(p for p in pieces if p is not piece)] for piece, test in tests]
            edges = [np.tile(_interval(_envelope(known)), (len(p), 1)) for known, p in zip(others, own, strict=True)]
            errors[name] = _figures(np.concatenate(own), *np.concatenate(edges).T)
    known = np.log(seconds / law.table(device).many(list(coordinates)))
    errors["fitted"] = _figures(known, *_interval(_quantiles(inside)))
    law.errors_ = errors
    law.residuals_ = {"interpolated": _quantiles(inside), "extrapolated": _envelope([inside, *pieces])}


def _by_folds(residual: FloatArray, fold: Any) -> dict[str, float]:
    """Return the figures of residuals, each fifth against the interval made of the other four."""
    edges = np.array([_interval(_quantiles(residual[fold != number])) for number in range(FOLDS)])
    return _figures(residual, edges[fold, 0], edges[fold, 1])


def largest_split(kind: str, coordinates: tuple[FloatArray, ...]) -> Any:
    """Return a mask of the 15 % of points with the largest product of sizes, or None if sizes hardly vary."""
    work = np.log(np.maximum(np.stack(coordinates), 1.0)).sum(0)
    edge = np.quantile(work, 1 - LARGEST_SHARE)
    mask = work > edge if (work > edge).any() else work >= edge
    assert kind in LAWS
    return mask if 0 < mask.sum() < len(mask) else None


def dimension_splits(coordinates: tuple[FloatArray, ...]) -> list[Any]:
    """Return one mask per coordinate with three or more values: all points with its middle value."""
    masks = []
    for at in coordinates:
        values, counts = np.unique(at, return_counts=True)
        if len(values) < 3:
            continue
        inner = values[1:-1]
        # the middle value that holds enough points to say something
        order = np.argsort(np.abs(np.arange(len(inner)) - (len(inner) - 1) / 2))
        enough = [inner[i] for i in order if counts[i + 1] >= max(2, len(at) // (4 * len(values)))]
        if enough:
            masks.append(at == enough[0])
    return masks


def neighbour_correlation(coordinates: tuple[FloatArray, ...], residual: FloatArray) -> float:
    """Return how alike the held-out residuals of nearest neighbours are, 0..1."""
    from scipy.spatial import cKDTree

    if len(residual) < 10:
        return 0.0
    rows = np.random.default_rng(0).permutation(len(residual))[:2000]
    points = logs(tuple(c[rows] for c in coordinates))
    index = cKDTree(points).query(points, k=2)[1][:, 1]
    ranks = np.argsort(np.argsort(residual[rows])).astype(float)
    if np.ptp(ranks[index]) == 0:  # sizes that were measured again and again: all have one neighbour
        return 0.0
    return float(np.clip(np.corrcoef(ranks, ranks[index])[0, 1], 0.0, 1.0))


def _quantiles(residual: FloatArray) -> FloatArray:
    """Return the residuals' quantiles at ``LEVELS`` (conformal ranks).

    The outermost of n residuals stands for the share 1 / (n + 1). Fewer than 19 say nothing of the 5 % beyond: there
    they are stretched as a normal distribution's tails would be.
    """
    from scipy.special import ndtri

    count = len(residual)
    ranked = np.sort(residual)
    positions = np.arange(1, count + 1) / (count + 1)
    found = np.interp(LEVELS, positions, ranked)
    if count > 1:
        middle = np.median(ranked)
        levels, inner = LEVELS[1:-1], found[1:-1]  # a view
        for end, beyond in ((0, levels < positions[0]), (-1, levels > positions[-1])):
            inner[beyond] = middle + (ranked[end] - middle) * ndtri(levels[beyond]) / ndtri(positions[end])
        found[0], found[-1] = min(found[0], found[1]), max(found[-1], found[-2])
    return found


def _envelope(pieces: Sequence[FloatArray]) -> FloatArray:
    """Return quantiles at ``LEVELS`` as wide as the widest of the pieces on either side of the middle.

    A piece is one way to leave the measured sizes, and its residuals lie together; the next way is none of those known,
    so that points pooled over them promise too much (76 % of the largest sizes inside their 90 %, against 82 %).
    """
    quantiles = np.array([_quantiles(piece) for piece in pieces])
    middle = _quantiles(np.concatenate(pieces))
    return np.where(LEVELS < 0.5, quantiles.min(0), np.where(LEVELS > 0.5, quantiles.max(0), middle))


def _interval(quantiles: FloatArray) -> tuple[float, float]:
    low, high = np.interp([(1 - LEVEL) / 2, (1 + LEVEL) / 2], LEVELS, quantiles)
    return float(low), float(high)


def _figures(residual: FloatArray, low: FloatArray | float, high: FloatArray | float) -> dict[str, float]:
    """Return the error of held-out points, and how many of them the intervals made without them hold."""
    error = np.abs(np.expm1(-residual))  # |predicted / measured - 1|
    return {
        "mape": float(error.mean()),
        "median": float(np.median(error)),
        "p90": float(np.quantile(error, 0.9)),
        "count": len(residual),
        "coverage": float(((residual >= low) & (residual <= high)).mean()),
        "half_width": float(np.mean(np.exp(high) - np.exp(low)) / 2),
    }
