"""``OpTimes``: op times learned from measurements, with their error; falls back to the data sheet and says so."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from longcat_sim.calibration.answer import Answer, Key
from longcat_sim.calibration.collectives import KERNEL_GAP_S, CollectiveTimes
from longcat_sim.calibration.draws import Draw
from longcat_sim.calibration.fit_file import read_fit, write_section
from longcat_sim.calibration.fitted import LEVELS, FittedLaw
from longcat_sim.calibration.laws import LAWS
from longcat_sim.calibration.lenders import Lent, lent_collectives, nearest
from longcat_sim.calibration.roofline import Roofline
from longcat_sim.calibration.splits import judge
from longcat_sim.calibration.transfer import SHEET_ERROR, device_of, transfer_spread
from longcat_sim.calibration.weights import law_parts
from longcat_sim.errors import MeasurementError, SpecError, UnmeasuredOpError
from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, OpTimesLike, ResourceShares, Tag, worst_tag
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.hardware import HardwareSpec

MIN_POINTS = 5
"""Fewest points of one kind, dtype and variant that a law can be fitted to."""
LINK_DRAWS = 100
"""Draws from which the interval of a collective is found: to 7 % of its width."""
_one_fit = Lock()
"""The limit on BLAS threads is the process's: of two fits at once, the later one would restore that of the earlier."""
PASSES: dict[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {
    "norm": lambda d: (d["rows"], d["width"], 1.0),
    "permute": lambda d: (d["rows"], d["width"], 1.0),
    "embedding": lambda d: (d["tokens"], d["width"], 1.0),
}
"""Kinds that, where nobody measured them, take the time of an elementwise pass over as many bytes."""


@dataclass(eq=False)
class OpTimes:
    """Times of ops alone on one device. ``fit`` or ``from_hardware`` makes one; ``draw(i)`` is one bootstrap draw."""

    hardware: HardwareSpec
    laws_: dict[Key, FittedLaw]
    collectives_: Any = None
    """``CollectiveTimes`` that were measured on this hardware, or None."""
    seed: int = 0
    draws: int = 64
    provenance: Mapping[str, Any] = field(default_factory=dict)
    borrows: bool = False
    """Whether a kind that was not measured here takes the law of the nearest device that has one."""

    def __post_init__(self) -> None:
        self._sheet = Roofline(self.hardware)
        self._answers: dict[Key, Answer | None] = {}
        self._seconds: dict[Op, float] = {}

    # -- learning ------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        measurements: Iterable[Measurement],
        hardware: HardwareSpec,
        draws: int = 64,
        seed: int = 0,
        *,
        max_cells: int = 24000,
        held_out: bool = True,
        min_points: int = MIN_POINTS,
    ) -> OpTimes:
        """Return op times fitted to measurements of ops alone; collectives and overlapped points are left to others.

        With ``held_out`` the error on three splits is found too (``errors_``), and from it the intervals. A law with
        fewer than ``MIN_POINTS`` distinct sizes (allowed by a lower ``min_points``) learns an efficiency and no more.
        What is predicted is the median time: on a machine with neighbours the 10th percentile is the luck of a moment,
        and a step of many ops is not the sum of their luck. ``provenance`` says how far the blocks of a point lay
        apart, by kind, and which kinds had too few sizes for a law and were left out (a time box may end within one).

        Raises:
            MeasurementError: no kind has enough points (says how many each has and needs).
        """
        grouped: dict[Key, list[Measurement]] = defaultdict(list)
        for row in measurements:
            if not row.is_contention and row.op.kind in LAWS:
                grouped[row.op.kind, row.op.dtype, row.op.variant].append(row)
        if not grouped:
            raise MeasurementError("expected measurements of ops alone; got none; measure some with `profile`")
        sizes = {key: len({row.op for row in rows}) for key, rows in grouped.items()}
        few = {key: found for key, found in sizes.items() if found < min_points}
        if len(few) == len(grouped):
            raise MeasurementError(
                [
                    f"{' '.join(filter(None, key))}: expected at least {min_points} sizes; got {found}; "
                    f"measure {min_points - found} more"
                    for key, found in few.items()
                ]
            )
        left_out = {
            f"{' '.join(filter(None, key))}: {found} sizes, a law needs {min_points}": len(grouped.pop(key))
            for key, found in sorted(few.items())
        }

        def fit_one(number: int, key: Key) -> FittedLaw:
            rows = grouped[key]
            rng = np.random.default_rng([seed, number])
            coordinates, seconds = points_of(key[0], rows)
            law = FittedLaw.fit(key, coordinates, seconds, devices[key], max_cells=max_cells, rng=rng)
            law.provenance = tuple(sorted({row.source for row in rows if row.source}))
            if draws > 1:
                law.bootstrap(coordinates, seconds, draws, rng)
            if held_out and sizes[key] >= MIN_POINTS:
                p10 = np.array([row.p10_s for row in rows]) if any(row.block_s for row in rows) else None
                judge(law, coordinates, seconds, rng=rng, max_cells=max_cells, p10=p10)
            return law

        devices = {key: device_of(hardware, key[1]) for key in sorted(grouped)}
        # a thread per core and law, the longest first; more threads within one (BLAS) would only wait for each other
        order = sorted(enumerate(devices), key=lambda law: -len(grouped[law[1]]))
        import scipy.linalg  # noqa: F401  # brings a BLAS of its own, which is limited only once it is there

        with _one_fit, threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
            found = dict(zip((key for _, key in order), threads.map(lambda law: fit_one(*law), order), strict=True))
        laws = {key: found[key] for key in devices}
        drift = {
            " ".join(filter(None, key)): float(f"{np.median([row.drift for row in rows]):.3g}")
            for key, rows in sorted(grouped.items()) if any(row.block_s for row in rows)
        }  # fmt: skip
        provenance = {name: said for name, said in (("drift", drift), ("left_out", left_out)) if said}
        return cls(hardware, laws, seed=seed, draws=draws, provenance=provenance)

    @classmethod
    def from_hardware(cls, hardware: HardwareSpec, *, seed: int = 0) -> OpTimes:
        """Return the op times that a profile's ``fit:`` section holds.

        A kind that it lacks takes the law of the nearest profile that has one, scaled by both data sheets; where none
        is near, the data sheet's roofline.

        Raises:
            MeasurementError: the section was written by another version.
        """
        laws, collectives, provenance, draws = read_fit(hardware)
        return cls(hardware, laws, collectives, seed=seed, draws=draws, provenance=provenance, borrows=True)

    def to_fit(self) -> dict[str, Any]:
        """Return the ``fit:`` section of a hardware profile."""
        return write_section(self.laws_.values(), self.collectives_, self.provenance)

    @property
    def errors_(self) -> list[dict[str, Any]]:
        """One row per law and split: kind, dtype, variant, split, mape, median, p90, count, coverage, half_width."""
        return [
            {"kind": law.kind, "dtype": law.dtype, "variant": law.variant, "split": split, **figures}
            for law in self.laws_.values()
            for split, figures in law.errors_.items()
        ]

    # -- answering -----------------------------------------------------------------------------------------------

    def seconds(self, op: Op) -> float:
        """Return the time of one op, alone on the device.

        Raises:
            UnmeasuredOpError: neither measured nor in the data sheet; says what is missing and what to do.
        """
        known = self._seconds.get(op)
        if known is not None:
            return known
        if KINDS[op.kind].is_collective:
            known = float(self.links.seconds(op))
        else:
            answer = self.answer((op.kind, op.dtype, op.variant))
            if answer is None:
                known = self._sheet_seconds(op)
            else:
                known = answer.table.one(answer.reduce(op.dims)) if _is_work(op) else 0.0
        if len(self._seconds) < 500_000:
            self._seconds[op] = known
        return known

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N].

        Raises:
            UnmeasuredOpError: as ``seconds``.
        """
        if KINDS[ops.kind].is_collective:
            return np.asarray(self.links.seconds_many(ops), dtype=float)
        answer = self.answer((ops.kind, ops.dtype, ops.variant))
        if answer is None:
            return self._sheet_many(ops)
        points = _broadcast(answer.reduce(ops.dims), len(ops))
        return np.where(_work(ops), answer.table.many(points), 0.0)

    def demand(self, op: Op) -> ResourceShares:
        """Return what the op uses of SMs, memory and links while it runs alone.

        ``sm``: the law's compute time over the op's time; ``memory``: bytes at the law's attainable bandwidth over it.
        """
        if KINDS[op.kind].is_collective:
            return self.links.demand(op)
        answer = self.answer((op.kind, op.dtype, op.variant))
        if answer is None:
            return ResourceShares(host=1.0) if op.kind == "host" else self._sheet.demand(op)
        point = tuple(np.array([c]) for c in answer.reduce(op.dims))
        fixed, compute, memory = law_parts(answer.law.weights_, point, answer.law.kind, answer.dtype, answer.device)
        total = float((fixed + np.maximum(compute, memory))[0])
        if total <= 0 or not _is_work(op):
            return ResourceShares()
        if op.kind == "host":
            return ResourceShares(host=1.0)
        return ResourceShares(sm=min(1.0, float(compute[0]) / total), memory=min(1.0, float(memory[0]) / total))

    def tag(self, op: Op) -> Tag:
        """Return where the figure comes from."""
        if KINDS[op.kind].is_collective:
            return self.links.tag(op)
        answer = self.answer((op.kind, op.dtype, op.variant))
        if answer is None:
            return "datasheet"
        point = tuple(np.array([float(c)]) for c in answer.reduce(op.dims))
        return worst_tag([answer.best, answer.law.tags(point)[0]])

    def interval(self, op: Op, level: float = 0.9) -> tuple[float, float]:
        """Return the interval that holds the measured time with probability ``level``: by held-out residuals, and of a
        collective by its draws."""
        from scipy.special import ndtri

        is_collective = KINDS[op.kind].is_collective
        answer = None if is_collective else self.answer((op.kind, op.dtype, op.variant))
        seconds = self.seconds(op)
        low, high, spread = 0.0, 0.0, SHEET_ERROR
        if is_collective and seconds > 0:
            drawn = [self.links.draw(index).seconds(op) for index in range(LINK_DRAWS)]
            spread = float(np.sqrt(np.mean(np.log(np.array(drawn) / seconds) ** 2)))
        if answer is not None:
            point = tuple(np.atleast_1d(np.asarray(part, dtype=float)) for part in answer.reduce(op.dims))
            tag = "extrapolated" if answer.is_far else answer.law.tags(point)[0]
            low, high = np.interp([(1 - level) / 2, (1 + level) / 2], LEVELS, answer.law.quantiles(tag))
            spread = float(answer.spread_at(point)[0])
        extra = float(ndtri((1 + level) / 2)) * spread
        return seconds * float(np.exp(low - extra)), seconds * float(np.exp(high + extra))

    def draw(self, index: int) -> OpTimesLike:
        """Return one bootstrap draw of the whole fit, itself an ``OpTimesLike``. Equal indices give equal draws."""
        return Draw(self, index)

    def notes(self, ops: Sequence[Op] = (), collectives: Iterable[tuple[str, str, Tag]] = ()) -> list[str]:
        """Return what a reader must know: which kinds come from the data sheet or were carried over, and how far.

        ``collectives`` are (kind, variant, tag): whether one was measured depends on its bytes and ranks.
        """
        names: dict[str, list[str]] = defaultdict(list)
        for kind, dtype, variant in sorted({(o.kind, o.dtype, o.variant) for o in ops if not o.is_collective}):
            answer = self.answer((kind, dtype, variant))
            name = " ".join(filter(None, (kind, dtype, variant)))
            if answer is None:
                says = (
                    f"from the data sheet of {self.hardware.name}, not measured; kernels of an H100 take 1.65 "
                    f"times their data-sheet time (measured median), spread {SHEET_ERROR:.0%}"
                )
            elif answer.spread > 0:
                law = " ".join(filter(None, answer.law.key))
                origin = f" of {answer.origin}" if answer.origin else ""
                source = "laws" if answer.origin and law == name else law
                most = "up to " if answer.is_edited else ""
                widened = f"interval widened by {most}{answer.spread:.0%} (measured transfer error)"
                says = f"carried over from {source}{origin}; {widened}"
            else:
                continue
            names[says].append(name)
        found = [f"{', '.join(same)}: {says}" for says, same in names.items()]
        found += self.links.notes(collectives)
        if self.provenance.get("backend"):
            found.insert(
                0,
                f"{self.hardware.name}: published kernels of {self.provenance['backend']} where there are such tables, "
                "of other engines where not (`sources` of each law in its profile)",
            )
        if self.hardware.has_own_kernels and self.hardware.sm_count != 1:
            found.insert(
                0,
                f"{self.hardware.name}: kernels of the executable model (torch), mostly slower than an engine's; "
                "profiles of published tables hold an engine's",
            )
        return found

    @cached_property
    def links(self) -> CollectiveTimes:
        """What answers for collectives: tables measured here, those of near devices, the data sheet's links."""
        own: CollectiveTimes = self.collectives_ or CollectiveTimes(
            self.hardware, [], kernel_gap_s=KERNEL_GAP_S if self.hardware.has_kernel_gaps else 0.0
        )
        return replace(own, lent=lent_collectives(self.hardware)) if self.borrows and not own.has_all else own

    def answer(self, key: Key) -> Answer | None:
        """Return how ``key`` is answered, or None for the data sheet."""
        if key not in self._answers:
            self._answers[key] = self._find(key)
        return self._answers[key]

    def _find(self, key: Key) -> Answer | None:
        """Return this device's law of the kind; else of the pass that it is; else those of the nearest device.

        Where its own law is of other kernels (variant), that of the same cores for the kernels asked for goes before.
        """
        kind, dtype, variant = key
        sorts = [(kind, LAWS[kind].reduce), *([("elementwise", PASSES[kind])] if kind in PASSES else [])]
        for sort, reduce in sorts:
            own = [law for law in self.laws_.values() if law.kind == sort]
            if not own:
                continue
            law = min(own, key=lambda law: (law.variant != variant, law.variant != "", law.dtype != dtype, -law.count_))
            if self.borrows and law.variant not in ("", variant):
                lent = nearest(key, self.hardware)
                if lent is not None and lent.law.key == key and lent.lender.architecture == self.hardware.architecture:
                    return self._answer(key, lent.law, reduce, lent)
            return self._answer(key, law, reduce)
        for sort, reduce in sorts if self.borrows else []:
            lent = nearest((sort, dtype, variant), self.hardware)
            if lent is not None:
                return self._answer(key, lent.law, reduce, lent)
        return None

    def _answer(self, key: Key, law: FittedLaw, reduce: Any, lent: Lent | None = None) -> Answer:
        kind, dtype, variant = key
        try:
            same = device_of(self.hardware, law.dtype)
        except SpecError as error:
            raise UnmeasuredOpError(
                f"hardware {self.hardware.name}: {kind} in {dtype}: not measured, and {error}"
            ) from None
        try:
            device = device_of(self.hardware, dtype)
        except SpecError:  # the device has no such type: it computes in the one that was measured
            device, dtype = same, law.dtype
        origin, other_cores, other_maker = law.transferred_from, False, False
        if lent is not None:
            origin, device = lent.lender.name, lent.scaled_to(self.hardware, device)
            other_cores = lent.lender.architecture != self.hardware.architecture
            other_maker = lent.lender.maker != self.hardware.maker
        spread = transfer_spread(law, same, dtype, variant, other_cores=other_cores, other_maker=other_maker)
        carried = law.kind != kind or law.dtype != dtype or law.variant not in ("", variant)
        best: Tag = "extrapolated" if carried or spread > 0 else "interpolated" if origin else "measured"
        edited = lent is None and not (carried or law.transferred_from) and bool(law.residuals_)
        return Answer(law, law.table(device, dtype), device, dtype, best, reduce, spread, origin, edited)

    def _sheet_seconds(self, op: Op) -> float:
        try:
            return self._sheet.seconds(op)
        except UnmeasuredOpError as error:
            raise UnmeasuredOpError([*error.faults, self._has()]) from None

    def _sheet_many(self, ops: OpArrays) -> FloatArray:
        try:
            return self._sheet.seconds_many(ops)
        except UnmeasuredOpError as error:
            raise UnmeasuredOpError([*error.faults, self._has()]) from None

    def _has(self) -> str:
        known = ", ".join(" ".join(filter(None, key)) for key in sorted(self.laws_)) or "nothing"
        return f"hardware {self.hardware.name}: fit: measured are {known}; measure the missing kind with `profile`"


def _work(ops: OpArrays) -> Any:
    """Return which ops have anything to do; an empty op launches no kernel."""
    return (ops.memory_bytes > 0) | (ops.kind == "host")


def _is_work(op: Op) -> bool:
    return op.kind == "host" or min(op.sizes) > 0 or op.memory_bytes > 0


def _broadcast(parts: tuple[Any, ...], length: int) -> list[FloatArray]:
    return [np.broadcast_to(np.asarray(part, dtype=float), (length,)) for part in parts]


def points_of(kind: str, rows: Sequence[Measurement]) -> tuple[tuple[FloatArray, ...], FloatArray]:
    """Return the coordinates and seconds of measurements of one kind."""
    names = KINDS[kind].dims
    sizes = np.array([row.op.sizes for row in rows])
    coordinates = LAWS[kind].reduce({name: sizes[:, i] for i, name in enumerate(names)})
    return tuple(_broadcast(coordinates, len(rows))), np.array([row.median_s for row in rows])
