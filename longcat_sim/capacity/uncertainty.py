"""Where a figure's interval comes from: variance by source with common random numbers, and what to measure next.

A sample of a figure is ``sample(indices)``: one index per source (calibration, routing, traffic, discrepancy). Index 0
is the centre (the fit itself, one fixed routing or traffic seed); equal indices give equal draws, whatever the other
sources do. That is what lets one source move while the others stand still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longcat_sim.calibration.transfer import SHEET_ERROR
from longcat_sim.capacity.interval import Interval
from longcat_sim.errors import CapacityError
from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, OpTimesLike, ResourceShares, Tag
from longcat_sim.simulation.step import MODEL_DISCREPANCY

SOURCES = ("calibration", "routing", "traffic", "discrepancy")
Sample = Callable[[Mapping[str, int]], Mapping[str, float]]


@dataclass(frozen=True)
class Uncertainty:
    """Intervals of every figure, and for each the share of its variance that each source alone explains."""

    intervals: dict[str, Interval]
    shares: dict[str, dict[str, float]]
    """figure -> source -> share. They and ``together`` (what only appears when sources move at once) add up to 1; of a
    figure that does not vary all are 0."""
    draws: dict[str, FloatArray] = field(repr=False, default_factory=dict)


def uncertainty(sample: Sample, sources: Sequence[str] = SOURCES, draws: int = 32) -> Uncertainty:
    """Return intervals over ``draws`` samples in which all sources move, and variance shares by source.

    Each source is also moved alone, by the same draws that it had in the samples of all (common random numbers). The
    share of a source is its variance alone over the variance of all; where sources partly cancel, shares are scaled to
    add up to 1.

    Raises:
        CapacityError: fewer than two draws.
    """
    if draws < 2:
        raise CapacityError(f"draws: expected at least 2 for an interval, such as 32; got {draws}; raise it")
    indices = range(1, draws + 1)
    whole = [sample({source: index for source in sources}) for index in indices]
    names = [name for name in whole[0] if all(_is_number(row.get(name)) for row in whole)]
    arrays = {name: np.array([float(row[name]) for row in whole]) for name in names}
    alone: dict[str, dict[str, float]] = {name: {} for name in names}
    for source in sources:
        rows = [sample({other: index if other == source else 0 for other in sources}) for index in indices]
        for name in names:
            values = [float(row[name]) for row in rows if _is_number(row.get(name))]
            alone[name][source] = float(np.var(values, ddof=1)) if len(values) == draws else 0.0
    shares = {name: _shares(alone[name], float(np.var(arrays[name], ddof=1))) for name in names}
    return Uncertainty({name: Interval.of(arrays[name]) for name in names}, shares, arrays)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _shares(alone: Mapping[str, float], total: float) -> dict[str, float]:
    """Return shares by source and ``together``; a variance of sampling noise size counts as none."""
    explained = sum(alone.values())
    whole = max(total, explained)
    if whole <= 0:
        return {**dict.fromkeys(alone, 0.0), "together": 0.0}
    return {**{source: value / whole for source, value in alone.items()}, "together": (whole - explained) / whole}


@dataclass(frozen=True)
class Discrepancy:
    """Model error that remains when every op time is right: log ratios (measured / predicted) of whole systems.

    The systems are ones that were left out of the fit. ``factor(i)`` draws one of them, jittered by the kernel width
    that makes the smoothed sample's variance the sample's own. Without residuals it is log-normal around 1 with the
    spread that the step model has on whole published steps.

    Source: smoothed bootstrap with variance correction, Silverman and Young, Biometrika 74 (1987), section 2.
    """

    log_residuals: tuple[float, ...] = ()
    seed: int = 0
    spread: float = MODEL_DISCREPANCY

    def factor(self, index: int) -> float:
        """Return the factor on a predicted time of draw ``index``; 1 for index 0."""
        if index == 0:
            return 1.0
        rng = np.random.default_rng([self.seed, 7, index])
        if not self.log_residuals:
            return float(np.exp(self.spread * rng.standard_normal()))
        values = np.asarray(self.log_residuals)
        # a systematic shift is reported, not corrected: spread about zero, of the residuals' root mean square
        spread = float(np.sqrt(np.mean(values**2)))
        width = 0.9 * spread * len(values) ** -0.2
        drawn = rng.choice(values) * rng.choice((-1.0, 1.0)) + width * rng.standard_normal()
        return float(np.exp(drawn / np.sqrt(1 + (width / spread) ** 2))) if spread > 0 else 1.0


@dataclass(frozen=True)
class ScaledKinds:
    """Op times in which some kinds take ``factors[kind]`` times as long, or come from ``draw`` instead.

    The rest is ``base``'s. What "everything else being equal" means for one kind of op.
    """

    base: OpTimesLike
    factors: Mapping[str, float] = field(default_factory=dict)
    draw: OpTimesLike | None = None
    kinds: frozenset[str] = frozenset()
    """Kinds that ``draw`` answers."""

    def _of(self, kind: str) -> OpTimesLike:
        return self.draw if self.draw is not None and kind in self.kinds else self.base

    def seconds(self, op: Op) -> float:
        """Return the time of one op."""
        return self._of(op.kind).seconds(op) * self.factors.get(op.kind, 1.0)

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N]."""
        return self._of(ops.kind).seconds_many(ops) * self.factors.get(ops.kind, 1.0)

    def demand(self, op: Op) -> ResourceShares:
        """Return the base's shares."""
        return self.base.demand(op)

    def tag(self, op: Op) -> Tag:
        """Return the base's tag."""
        return self.base.tag(op)


@dataclass(frozen=True)
class Advice:
    """What measuring one kind of op would do for a figure."""

    kind: str
    tag: str
    """Worst tag of its ops in this step."""
    share: float
    """Of the figure's variance."""
    narrowing: float
    """Share by which the figure's interval would shrink if this kind were known exactly."""
    suite: str
    """The ``profile --suite`` that measures it."""


SUITES = {
    **dict.fromkeys(("gemm", "bmm"), "gemm"), "grouped_gemm": "grouped-gemm",
    **dict.fromkeys(("mla_decode", "gqa_decode", "attention_prefill"), "attention"),
    **dict.fromkeys(("topk", "indexer", "sparse_mla"), "topk"),
    **dict.fromkeys(("norm", "elementwise", "router", "permute", "embedding", "sampling", "host"), "small-ops"),
    **{name: "collectives" for name, kind in KINDS.items() if kind.is_collective},
}  # fmt: skip


def measure_next(
    figure: Callable[[OpTimesLike], float],
    op_times: Any,
    tags: Mapping[str, str],
    *,
    draws: int = 12,
    other_variance: float = 0.0,
) -> list[Advice]:
    """Return the kinds of op ranked by how much knowing them would narrow ``figure``, most first.

    ``figure`` evaluates the decision with given op times; ``tags`` are the worst tags of the step's op kinds. A kind
    moves by the op times' own draws; one from a data sheet that does not vary there by ``SHEET_ERROR``.
    ``other_variance`` is what routing, traffic and model error add.

    Raises:
        CapacityError: no kinds.
    """
    if not tags:
        raise CapacityError("tags: expected the op kinds of a step, such as {'gemm': 'measured'}; got none")
    can_draw = hasattr(op_times, "draw")
    variances: dict[str, float] = {}
    centre = figure(op_times)
    for kind, tag in tags.items():
        values = [0.0]
        for index in range(1, draws + 1) if can_draw else ():
            moved = ScaledKinds(op_times, draw=op_times.draw(index), kinds=frozenset({kind}))
            values.append(figure(moved) - centre)
        variances[kind] = float(np.sum(np.square(values))) / max(1, len(values) - 1)
        if (
            tag == "datasheet" and variances[kind] == 0
        ):  # op times without draws: half a swing of one deviation each way
            ends = [figure(ScaledKinds(op_times, {kind: float(np.exp(sign * SHEET_ERROR))})) for sign in (-1, 1)]
            variances[kind] = ((ends[1] - ends[0]) / 2) ** 2
    total = sum(variances.values()) + other_variance
    advice = [
        Advice(
            kind, tags[kind], value / total if total else 0.0,
            1 - float(np.sqrt(max(total - value, 0.0) / total)) if total else 0.0, SUITES.get(kind, ""),
        )
        for kind, value in variances.items()
    ]  # fmt: skip
    return sorted(advice, key=lambda row: -row.share)


def chance_of(met: int, draws: int) -> float:
    """Return the chance behind ``met`` of ``draws``, with half a draw added on each side (Jeffreys), so never 0 or 1.

    Source: Brown, Cai, DasGupta, Statistical Science 16 (2001), section 3.1.
    """
    return (met + 0.5) / (draws + 1)


def check_draws(draws: int, wanted: float, where: str) -> None:
    """Raise CapacityError if so few draws cannot show so high a chance; says how many can."""
    if draws > 1 and chance_of(draws, draws) < wanted:
        least = math.ceil((wanted - 0.5) / (1 - wanted) - 1e-9)
        raise CapacityError(
            f"{where}: search.probability: expected at most {chance_of(draws, draws):.3f}, which {draws} draws can "
            f"show when all keep the level; got {wanted:g}; ask for less, or set draws: {least}"
        )


def probability(draws: FloatArray | Sequence[float], limit: float, *, at_most: bool = True) -> float:
    """Return the chance that a figure is within ``limit``, from its draws [N]."""
    values = np.asarray(draws, dtype=float)
    return chance_of(int((values <= limit).sum() if at_most else (values >= limit).sum()), len(values))
