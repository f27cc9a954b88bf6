"""``Draw``: one bootstrap draw of a whole fit, as an ``OpTimesLike``.

Where sizes were measured, a draw differs from the fit by a smooth random field whose values follow the law's held-out
residuals; the field's share that neighbouring sizes have in common is the correlation found there. Beyond the measured
sizes the draw's own weights (fitted to a resample) bend the law too. Carried-over laws get one common shift more.
"""

from __future__ import annotations

from typing import Any, Protocol
from zlib import crc32

import numpy as np

from longcat_sim.calibration.answer import Answer, Key
from longcat_sim.calibration.fitted import LEVELS
from longcat_sim.calibration.local import logs
from longcat_sim.calibration.transfer import SHEET_ERROR
from longcat_sim.calibration.weights import law_seconds
from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, ResourceShares, Tag

WAVES = 8
"""Random cosines whose sum is close to a normal field."""
TAIL = 3.0
"""The outermost residual reaches at most this many times as far beyond its neighbour as that is beyond the next: it is
a single row of a table, some of them wrong by 70 times, and a straight line to it would spoil every twentieth draw."""
OCTAVES = 2.0
"""Length over which the field changes (assumed: kernels change their tiling every octave or two)."""


class Fit(Protocol):
    """What a draw needs of the fit that it is drawn from (``OpTimes``)."""

    seed: int

    @property
    def links(self) -> Any:
        """What answers for collectives."""
        ...

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the fit's times [N]."""
        ...

    def demand(self, op: Op) -> ResourceShares:
        """Return the fit's shares."""
        ...

    def tag(self, op: Op) -> Tag:
        """Return where the fit's figure comes from."""
        ...

    def answer(self, key: Key) -> Answer | None:
        """Return which law answers for ``key``, or None for the data sheet."""
        ...


class Draw:
    """Op times of one draw. Equal (fit, index) give equal times, whatever was asked before."""

    def __init__(self, parent: Fit, index: int) -> None:
        self.parent = parent
        self.index = index
        self._fields: dict[Key, tuple[FloatArray, FloatArray, float, float]] = {}
        self._seconds: dict[Op, float] = {}
        self.links: Any = parent.links.draw(index)

    def seconds(self, op: Op) -> float:
        """Return the time of one op in this draw."""
        known = self._seconds.get(op)
        if known is None:
            arrays = {name: np.array([size]) for name, size in op.dims.items()}
            known = float(self.seconds_many(OpArrays(op.kind, arrays, op.dtype, op.variant))[0])
            self._seconds[op] = known
        return known

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind in this draw [N]."""
        if KINDS[ops.kind].is_collective:
            return np.asarray(self.links.seconds_many(ops), dtype=float)
        base = self.parent.seconds_many(ops)
        answer = self.parent.answer((ops.kind, ops.dtype, ops.variant))
        if answer is None:
            shift = self._field((ops.kind, ops.dtype, ops.variant), 1)[3]
            return base * np.exp(SHEET_ERROR * shift) if ops.kind != "host" else base
        law = answer.law
        points = tuple(np.broadcast_to(np.asarray(part, dtype=float), (len(ops),)) for part in answer.reduce(ops.dims))
        frequency, phase, common, shift = self._field((ops.kind, ops.dtype, ops.variant), len(points))
        wave = np.sqrt(2 / WAVES) * np.cos(logs(points) @ frequency + phase).sum(-1)
        normal = np.sqrt(law.correlation_) * common + np.sqrt(1 - law.correlation_) * wave
        share = _normal_cdf(normal)
        tags = law.tags(points)
        outside = np.array([tag == "extrapolated" for tag in tags]) | answer.is_far
        ratio = np.interp(share, LEVELS, _tamed(law.quantiles("interpolated")))
        if outside.any():
            ratio = np.where(outside, np.interp(share, LEVELS, _tamed(law.quantiles("extrapolated"))), ratio)
            if len(law.draws_):
                weights = law.draws_[self.index % len(law.draws_)]
                bent = np.log(
                    law_seconds(weights, points, law.kind, answer.dtype, answer.device)
                    / law_seconds(law.weights_, points, law.kind, answer.dtype, answer.device)
                )
                ratio = ratio + np.where(outside, bent, 0.0)
        return base * np.exp(ratio + shift * answer.spread_at(points))

    def demand(self, op: Op) -> ResourceShares:
        """Return the fit's shares: a slower draw of an op asks for the same resources for longer."""
        return self.parent.demand(op)

    def tag(self, op: Op) -> Tag:
        """Return where the fit's figure comes from."""
        return self.parent.tag(op)

    def _field(self, key: Key, dimensions: int) -> tuple[FloatArray, FloatArray, float, float]:
        """Return the random field of a law: frequencies, phases, the common part and the carried-over shift."""
        if key not in self._fields:
            rng = np.random.default_rng([self.parent.seed, self.index, crc32(" ".join(key).encode())])
            frequency = rng.normal(size=(dimensions, WAVES)) / OCTAVES
            phase = rng.uniform(0, 2 * np.pi, WAVES)
            self._fields[key] = frequency, phase, float(rng.normal()), float(rng.normal())
        return self._fields[key]


def _tamed(quantiles: FloatArray) -> FloatArray:
    """Return residual quantiles whose outermost two stay near the others."""
    tamed = np.array(quantiles, dtype=float)
    tamed[0] = max(tamed[0], tamed[1] - TAIL * (tamed[2] - tamed[1]))
    tamed[-1] = min(tamed[-1], tamed[-2] + TAIL * (tamed[-2] - tamed[-3]))
    return tamed


def _normal_cdf(x: FloatArray) -> FloatArray:
    from scipy.special import ndtr

    return ndtr(x)
