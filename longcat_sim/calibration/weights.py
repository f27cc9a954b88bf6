"""The weights of a law: how they are found, and the times that they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longcat_sim.calibration.laws import LAWS, Device
from longcat_sim.ops.op import FloatArray

PRIOR_WEIGHT = 1.25
"""Weight of the plain FLOP and byte terms where data says nothing: the 0.8 of the data-sheet roofline."""
PRIOR_POINTS = 0.3
"""The prior counts as about so many points that are wrong by their whole value."""
SMALL = 10.0
"""A point that takes this many times as long as the smallest ones counts half as much as the largest: a law must know
how large ops grow; small ones are mostly the floor, and the correction holds them."""
MANY = 100
"""With fewer points than this, all count alike: none can be spared."""
ROUNDS, EXACT = 12, 0.02
"""Of choosing branches; an error of this share counts little more than none."""
BEST_RATE = 0.999
"""Quantile of the measured rates that a roof is at least at: one row in a thousand may be luck."""


def weigh(
    coordinates: tuple[FloatArray, ...], seconds: FloatArray, kind: str, dtype: str, device: Device
) -> FloatArray:
    """Return the weights of a law [overhead, serial..., compute..., memory..., roof where it has one], all >= 0.

    They miss the seconds by the least mean relative error. The largest of compute, memory and roof is chosen per row,
    the rest is linear: rounds of choosing and non-negative least squares, and a descent to the least error nearby.
    The roof joins when the others have settled, and is no lower than the best measured rates.
    """
    serial, branches = columns(coordinates, kind, dtype, device)
    size, roof = _importance(seconds), _roof(branches, seconds)
    if LAWS[kind].has_roof:
        start = np.append(_settle(None, serial, branches[:2], seconds, size), roof)
        weights = _settle(start, serial, branches, seconds, size)
        weights[-1] = min(weights[-1], roof)
    else:
        weights = _settle(None, serial, branches, seconds, size)
    return _Descent(serial, branches, seconds, roof).bottom(weights, size)


def weigh_again(
    weights: FloatArray, coordinates: tuple[FloatArray, ...], seconds: FloatArray, kind: str, dtype: str,
    device: Device, counts: FloatArray,
) -> FloatArray:  # fmt: skip
    """Return the weights of bootstrap draws [draws, weights], each by a descent from ``weights``.

    ``counts`` says how often each draw holds each row [draws, N].
    """
    serial, branches = columns(coordinates, kind, dtype, device)
    descent, size = _Descent(serial, branches, seconds, _roof(branches, seconds)), _importance(seconds)
    return np.array([descent.bottom(weights, size * count) for count in counts])


def _importance(seconds: FloatArray) -> FloatArray:
    """Return how much each row counts, 1 on average."""
    if len(seconds) < MANY:
        return np.ones(len(seconds))
    size = seconds / (seconds + SMALL * np.quantile(seconds, 0.01))
    return np.asarray(size / size.mean())


def _roof(branches: list[FloatArray], seconds: FloatArray) -> float:
    """Return the largest weight of the roof; infinite for a law that has none."""
    return float(1.0 / np.quantile(branches[2][:, 0] / seconds, BEST_RATE)) if len(branches) > 2 else np.inf


class _Descent:
    """The way down to the least error of a law's weights, the last of them at most ``most`` (L-BFGS-B).

    Rounds of choosing may swing to and fro for ever where both compute and memory matter: the laws of a CPU's products
    were twice too slow by the last of them, and 7 % off here.
    """

    def __init__(self, serial: FloatArray, branches: list[FloatArray], seconds: FloatArray, most: float) -> None:
        self._edges = edges = _edges(serial, branches)
        rows = np.hstack([np.ones((len(seconds), 1)), serial, *branches]) / seconds[:, None]
        self._unit = unit = rows.mean(0)
        unit[unit == 0] = 1.0
        rows /= unit
        self._parts = [np.ascontiguousarray(part) for part in np.split(rows, edges[:-1], axis=1)]
        self._has_prior = np.zeros(edges[-1])
        starts = [at for at, branch in zip(edges, branches, strict=False) if branch.shape[1]]
        self._has_prior[starts] = PRIOR_POINTS / len(rows)
        self._bounds = [(0.0, None)] * (len(unit) - 1) + [(0.0, most * unit[-1])]

    def bottom(self, start: FloatArray, size: FloatArray) -> FloatArray:
        """Return the weights at the bottom around ``start``; ``size`` says how much each row counts [N]."""
        from scipy.optimize import minimize

        args = (size / len(size),)
        found = minimize(self._error, start * self._unit, args, jac=True, method="L-BFGS-B", bounds=self._bounds,
                         tol=1e-6).x  # fmt: skip
        return np.maximum(found / self._unit, 0.0)  # it may end 1e-19 below a bound

    def _error(self, scaled: FloatArray, share: FloatArray) -> tuple[float, FloatArray]:
        """Return the mean of sqrt(miss^2 + EXACT^2), with the prior's part, and its gradient."""
        fixed, *branches = self._parts
        weights = np.split(scaled, self._edges[:-1])
        longest, chosen = _longest([rows @ own for rows, own in zip(branches, weights[1:], strict=True)])
        missed = fixed @ weights[0] + longest - 1.0
        smooth = np.hypot(missed, EXACT)
        pull = share * missed / smooth
        away = scaled / self._unit - PRIOR_WEIGHT
        slope = [pull @ fixed, *((pull * (chosen == at)) @ rows for at, rows in enumerate(branches))]
        error = float(share @ smooth + self._has_prior @ away**2 / 2)
        return error, np.concatenate(slope) + self._has_prior * away / self._unit


def _settle(
    weights: FloatArray | None, serial: FloatArray, branches: list[FloatArray], seconds: FloatArray, size: FloatArray
) -> FloatArray:
    """Return the best weights of some rounds of choosing branches and fitting ([N] ``size``: of each row)."""
    from scipy.optimize import nnls

    edges = _edges(serial, branches)
    prior, goal = np.zeros((edges[-1], edges[-1])), np.zeros(edges[-1])
    for at, branch in zip(edges, branches, strict=False):
        if branch.shape[1]:
            prior[at, at] = np.sqrt(PRIOR_POINTS)
            goal[at] = PRIOR_WEIGHT * np.sqrt(PRIOR_POINTS)
    if weights is None:
        plain = [branch[:, :1].sum(1) for branch in branches]
        chosen, trust = _longest(plain)[1], np.ones(len(seconds))
        weights = np.zeros(edges[-1])
    else:
        chosen, trust, _ = _choice(weights, serial, branches, seconds)
    times, best, least = seconds[:, None], weights, np.inf
    for _ in range(ROUNDS):
        parts = [branch * (chosen == number)[:, None] for number, branch in enumerate(branches)]
        rows = np.hstack([np.ones_like(times), serial, *parts]) / times
        scale = np.sqrt(size * trust)
        stacked = np.vstack([rows * scale[:, None], prior])
        target = np.concatenate([scale, goal])
        norm = np.linalg.norm(stacked, axis=0)
        norm[norm == 0] = 1.0
        # the last column of r is q.T @ target
        r: Any = np.linalg.qr(np.column_stack([stacked / norm, target]), mode="r")
        fresh = nnls(r[:-1, :-1], r[:-1, -1])[0] / norm
        settled = np.allclose(fresh, weights, rtol=1e-4, atol=0)
        weights = fresh
        chosen, trust, error = _choice(weights, serial, branches, seconds)
        missed = float((size * error).mean())
        if missed < least:
            best, least = weights, missed
        if settled:
            break
    return best


def _edges(serial: FloatArray, branches: list[FloatArray]) -> list[int]:
    """Return where each branch's weights begin, and where the last ones end."""
    return [int(at) for at in np.cumsum([1 + serial.shape[1], *(branch.shape[1] for branch in branches)])]


def _times(weights: FloatArray, serial: FloatArray, branches: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Return (overhead and serial [N], branches [B, N]) seconds."""
    edges = _edges(serial, branches)
    ends = zip(branches, edges, edges[1:], strict=False)
    return weights[0] + serial @ weights[1 : edges[0]], np.stack([b @ weights[at:to] for b, at, to in ends])


def _choice(
    weights: FloatArray, serial: FloatArray, branches: list[FloatArray], seconds: FloatArray
) -> tuple[Any, FloatArray, FloatArray]:
    """Return which branch bounds each row, how far each row is trusted (1 / its relative error), and that error."""
    fixed, each = _times(weights, serial, branches)
    longest, chosen = _longest(list(each))
    error = np.abs((fixed + longest) / seconds - 1)
    return chosen, 1.0 / np.maximum(error, EXACT), error


def _longest(each: Sequence[FloatArray]) -> tuple[FloatArray, Any]:
    """Return the longest of the branches [N], and which it is; memory where it ties with compute."""
    longest, chosen = each[0], np.zeros(len(each[0]), np.intp)
    for number, branch in enumerate(each[1:], 1):
        is_longer = branch >= longest
        longest = np.where(is_longer, branch, longest)
        chosen[is_longer] = number
    return longest, chosen


def columns(
    coordinates: tuple[FloatArray, ...], kind: str, dtype: str, device: Device
) -> tuple[FloatArray, list[FloatArray]]:
    """Return the law's terms in seconds at the data sheet's rates: serial, and the branches of which the longest
    counts (compute, memory, and the roof's FLOP where the law has one), each [N, terms]."""
    law = LAWS[kind]
    terms = law.terms(dict(zip(law.coordinates, coordinates, strict=True)), dtype, device)
    shape = np.broadcast_shapes(*(np.shape(c) for c in coordinates))

    def stack(items: list[FloatArray], rate: float) -> FloatArray:
        flat = [np.broadcast_to(np.asarray(item, dtype=float), shape).ravel() / rate for item in items]
        return np.array(flat).T if flat else np.zeros((int(np.prod(shape)), 0))

    compute, memory = stack(terms.compute, device.peak), stack(terms.memory, device.bandwidth)
    roof = [compute[:, :1]] if law.has_roof else []
    return stack(terms.serial, device.sm_rate), [compute, memory, *roof]


def num_weights(kind: str, dtype: str, device: Device) -> int:
    """Return how many weights the law of a kind has."""
    ones = tuple(np.ones(1) for _ in LAWS[kind].coordinates)
    return _edges(*columns(ones, kind, dtype, device))[-1]


def law_parts(
    weights: FloatArray, coordinates: tuple[FloatArray, ...], kind: str, dtype: str, device: Device
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return (overhead and serial, compute, memory) seconds of the law [N]; compute is never above its roof's speed."""
    fixed, (compute, memory, *roof) = _times(weights, *columns(coordinates, kind, dtype, device))
    return fixed, np.maximum(compute, roof[0]) if roof else compute, memory


def law_seconds(
    weights: FloatArray, coordinates: tuple[FloatArray, ...], kind: str, dtype: str, device: Device
) -> FloatArray:
    """Return the law's time, without the local correction [N]."""
    fixed, compute, memory = law_parts(weights, coordinates, kind, dtype, device)
    return fixed + np.maximum(compute, memory)
