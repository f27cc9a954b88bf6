"""``CollectiveTimes``: collectives of one device by bytes and ranks, from measured tables, with their error.

Each (kind, variant, ranks) has a curve of seconds over bytes: measured points joined by straight lines (latency plus
bytes over bandwidth, which may grow with size). Where a table has one size only, the time of an empty message comes
from another device's sweep of the same kernels. Between rank counts seconds are interpolated in log2(ranks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from longcat_sim.calibration.collective_curves import Curve, fit_curves
from longcat_sim.calibration.importers.exchange import Point
from longcat_sim.calibration.roofline import COLLECTIVE_FLOOR_S, Roofline, link_passes, link_shares
from longcat_sim.ops.op import FloatArray, Op, OpArrays, ResourceShares, Tag
from longcat_sim.specs.hardware import HardwareSpec

SPREAD = 0.05
"""Relative difference of two independent measurements of one table (DeepEP low latency, EP16 to EP64: the authors' and
pplx-garden docs/fabric-lib.md @2446003)."""
BORROWED_SPREAD = 0.10
"""The same where a part of the curve, such as its floor, comes from another device (assumed: twice the above)."""
CARRIED_SPREAD = {"low_latency": 0.13, "normal": 0.21, "": 0.30}
"""Root mean square of log(measured / carried), by variant, where a whole table is another device's, scaled by the links
of both: 60 tables of low-latency exchanges and 24 of normal ones, and 256 of NCCL's collectives, between devices of one
maker whose links join as many. Found again by tests/unit/test_collective_errors.py."""
CARRIED_OCTAVES = 1.6
"""By so much the links inside a node differ at most between those devices (A100, B200)."""
NCCL_KINDS = frozenset({"all_gather", "all_reduce", "all_to_all", "reduce_scatter"})
SHEET_SPREAD, NCCL_SHEET_SPREAD = 0.51, 0.37
"""Root mean square of log(measured / data sheet), tables of the packaged profiles weighted alike: exchanges (22 tables
of seven devices, 280 points, 8 to 256 ranks; also taken for ``send``, which no table holds), and NCCL's collectives
inside a node (28 of seven, 380 points). The median table takes 1.15 and 1.29 times its data sheet; the point estimate
stays the data sheet's. Tables of dispatch and combine of one device miss together (correlation 0.86 over 11 pairs), so
one shift moves all of a draw. Found again by tests/unit/test_collective_errors.py."""
EXTRAPOLATED_SPREAD = 0.32
"""The same for what lies beyond the measured ranks: 56 predictions of a table of exchanges from those of its kernels on
fewer ranks, two nodes at least. (From one node alone: 1.2.) Found again by the same test. Taken too beyond twice the
largest message, and for links changed by an octave (less for less)."""
NORMAL_SMS = 24
"""SMs that the normal-mode kernels hold. Source: DeepEP docs/legacy.md @dd758ca (V1)."""
OVERLAP_RATES = {("dispatch", "normal"): 0.57, ("combine", "normal"): 0.77}
"""Rate of the normal-mode kernels beside compute, of their rate alone: 29 and 39 GB/s in an overlapped training step
against 51 and 50 GB/s alone, EP64. Source: deepseek-ai/profile-data train.json @4496024 (EP kernel durations)."""
TRAINING_SMS = 20
"""SMs that the exchange held in the trace of the rates above and below."""
BESIDE_EXCHANGE = {"gemm": 0.759, "grouped_gemm": 0.758, "attention_prefill": 0.92}
"""Rate of compute beside a normal-mode exchange on 20 of 132 SMs, of its rate alone: median over five projections and
two shared-expert products (854/1125, 1087/1426, 940/1265, 865/1168, 570/751 TFLOP/s), over two grouped products
(1030/1346, 912/1214), and attention (573/622 TFLOP/s). More than the SMs' share is lost. Source: kernel durations of
deepseek-ai/profile-data train.json @4496024 against the same shapes alone, DeepGEMM README @55ab91f and InferSim
@f2293da (attention)."""
KERNEL_GAP_S, KERNEL_GAP_SPREAD_S = 1.5e-6, 0.5e-6
"""Time between the end of a kernel and the start of the next one of its stream, which kernel tables (profiler
durations) leave out: 2.0 us over 857 gaps below 6 us on an H800, in a trace whose durations are cut to whole
microseconds (half a microsecond each). Source: deepseek-ai/profile-data train.json @4496024."""
FAR = 64.0
"""Times the largest measured message to which a table goes on when its links change. Assumed."""
LOCAL_PASSES = 4.0
"""Passes over device memory of a low-latency exchange on one rank, counted by what it must do: rows are staged, read by
the NIC, written by the NIC, unpacked (assumed: none of them stays in a cache)."""
NCCL_SMS = 16
"""SMs that a collective of NCCL holds inside a node (assumed)."""
NCCL_PASSES = 2.0
"""Passes over device memory of a collective of NCCL: each byte is read once and written once."""


@dataclass
class CollectiveTimes:
    """Times of collectives on one device; what no table holds comes from the data sheet's links, with their error."""

    hardware: HardwareSpec
    curves_: Sequence[Curve]
    reference: Mapping[str, float] = field(default_factory=dict)
    """Bandwidths of the links that were measured: what-if links scale against them."""
    drawn: int | None = None
    """Number of this draw; None: the fit itself."""
    carried_from: str = ""
    """Device that was measured, if it was another one."""
    kernel_gap_s: float = KERNEL_GAP_S
    """Idle time between two kernels of one stream."""
    lent: CollectiveTimes | None = None
    """The nearest device's tables on the links of this one, which answer for what its own tables do not hold."""

    def __post_init__(self) -> None:
        self._sheet = Roofline(self.hardware)
        self._tables: dict[tuple[str, str], list[Curve]] = {}
        for curve in self.curves_:
            self._tables.setdefault((curve.kind, curve.variant), []).append(curve)
        for table in self._tables.values():
            table.sort(key=lambda c: c.ranks)
        self._moved: dict[tuple[str, str, int], Curve] = {}
        if not self.reference:
            self.reference = _links(self.hardware)

    @classmethod
    def fit(
        cls, points: Iterable[Point], hardware: HardwareSpec, *, empty_from: CollectiveTimes | None = None
    ) -> CollectiveTimes:
        """Return the times of measured points; ``empty_from`` lends empty-message times where a table has one size."""
        kinds = [("dispatch", "low_latency"), ("combine", "low_latency"), ("dispatch", "normal"), ("combine", "normal")]
        return cls(hardware, fit_curves(points, dict.fromkeys(kinds, empty_from)))

    def carried_to(self, hardware: HardwareSpec, kinds: Iterable[str] | None = None) -> CollectiveTimes:
        """Return these curves for another device: times scale with its links' bandwidth."""
        wanted = set(kinds) if kinds is not None else None
        curves = [curve for curve in self.curves_ if wanted is None or curve.kind in wanted]
        return CollectiveTimes(hardware, curves, self.reference, carried_from=self.hardware.name)

    def with_curves(self, other: CollectiveTimes) -> CollectiveTimes:
        """Return these curves and, where they have none, those of ``other``, rescaled to this device's links."""
        known = set(self._tables)
        moved = []
        for curve in other.curves_:
            if (curve.kind, curve.variant) not in known:
                seconds = other._seconds(curve.kind, curve.variant, np.array(curve.bytes), curve.ranks)
                moved.append(replace(curve, seconds=tuple(seconds), borrowed=other.carried_from or other.hardware.name))
        return CollectiveTimes(self.hardware, [*self.curves_, *moved], _links(self.hardware))

    # -- answering -----------------------------------------------------------------------------------------------

    @property
    def has_all(self) -> bool:
        """Whether tables here answer for every collective that a step of one or more nodes needs."""
        exchanges = {(kind, mode) for kind in ("dispatch", "combine") for mode in ("low_latency", "normal")}
        return {*exchanges, *((kind, "") for kind in NCCL_KINDS)} <= self._tables.keys()

    def _lender(self, kind: str, variant: str) -> CollectiveTimes | None:
        """Return who answers for a kind that no table here holds; None: this one, by its data sheet."""
        holder: CollectiveTimes | None = self
        while holder is not None and (kind, variant) not in holder._tables:
            holder = holder.lent
        return None if holder is self else holder

    def floor_s(self, kind: str, variant: str, ranks: float) -> float:
        """Return the time of an empty message; 0 where no table here says it."""
        if (kind, variant) not in self._tables:
            return 0.0
        return float(self._seconds(kind, variant, np.zeros(1), ranks)[0])

    def seconds(self, op: Op) -> float:
        """Return the time of one collective with nothing beside it."""
        arrays = {name: np.array([size]) for name, size in op.dims.items()}
        return float(self.seconds_many(OpArrays(op.kind, arrays, op.dtype, op.variant))[0])

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many collectives of one kind [N]."""
        lender = self._lender(ops.kind, ops.variant)
        if lender is not None:
            return lender.seconds_many(ops)
        shift = self._shift(ops.kind, ops.variant)
        if (ops.kind, ops.variant) not in self._tables:
            return self._sheet.seconds_many(ops) * np.exp(shift[1])
        size, ranks = (np.asarray(ops.dims[name], dtype=float) for name in ("message_bytes", "ranks"))
        size, ranks = np.broadcast_arrays(size, ranks)
        result = np.empty(size.shape)
        for group in np.unique(ranks):
            here = ranks == group
            if group > 1:
                seconds = self._seconds(ops.kind, ops.variant, size[here], float(group))
                outside = self._outside(ops.kind, ops.variant, size[here], float(group))
                result[here] = seconds * np.exp(shift[0] + shift[1] * outside)
            else:
                result[here] = 0.0
        return result

    def _seconds(self, kind: str, variant: str, size: FloatArray, ranks: float) -> FloatArray:
        """Return seconds at ``ranks``, interpolated between the tables' rank counts in log2, on this device's links."""
        table = self._tables[kind, variant]
        at = np.log2(ranks)
        known = np.log2([curve.ranks for curve in table])
        low = int(np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(table) - 1))
        high = min(low + 1, len(table) - 1)
        share = 0.0 if high == low else float(np.clip((at - known[low]) / (known[high] - known[low]), 0.0, 1.0))
        first, second = self._scaled(table[low]).at(size), self._scaled(table[high]).at(size)
        return first + share * (second - first)

    def _scaled(self, curve: Curve) -> Curve:
        """Return the curve on the links of now: what the wire took of each point takes as much longer or shorter as
        they do, the rest (copies, protocol) stays, but for one latency. A larger message takes no less, and beyond the
        last point it takes longer as the wire does."""
        key = curve.kind, curve.variant, curve.ranks
        if key not in self._moved:
            now, then = self._wire_s(curve.kind, curve.ranks), self._measured_wire_s(curve.kind, curve.ranks)
            link = self.hardware.link_over(curve.ranks)
            later_s = _latency_s(self.hardware, link) - _latency_s(self.hardware.sheet, link)
            if now is None or then is None or (now == then and not later_s):
                self._moved[key] = curve
            else:
                size = np.array([*curve.bytes, FAR * max(curve.bytes[-1], 1.0)])
                seconds = curve.at(size)
                floor_s = curve.floor_s if len(curve.bytes) > 1 else 0.0
                wire = np.minimum(then * size, np.maximum(seconds - floor_s, 0.0))
                moved = np.maximum(seconds - wire + later_s, 0.0) + wire * (now / then)
                moved = np.maximum.accumulate(moved)
                self._moved[key] = replace(curve, bytes=tuple(size), seconds=tuple(moved))
        return self._moved[key]

    def _wire_s(self, kind: str, ranks: float) -> float | None:
        """Return the seconds that a byte takes on the busiest link of now; None where that is not known."""
        return _wire_s(kind, ranks, self.hardware, _links(self.hardware))

    def _measured_wire_s(self, kind: str, ranks: float) -> float | None:
        """The same of the links that were measured, which join as many devices as the data sheet's."""
        return _wire_s(kind, ranks, self.hardware.sheet, self.reference)

    def demand(self, op: Op) -> ResourceShares:
        """Return what a collective uses while it runs alone.

        The normal kernels hold their SMs throughout. The low-latency ones use SMs only to stage and to unpack: the
        time of an exchange inside one node with the wire taken out, as a share of the whole.
        """
        lender = self._lender(op.kind, op.variant)
        if lender is not None:
            return lender.demand(op)
        if (op.kind, op.variant) not in self._tables:
            return self._sheet.demand(op)
        seconds = self.seconds(op)
        if seconds <= 0:
            return ResourceShares()
        bandwidth = self.hardware.memory_bandwidth
        if op.variant == "normal":
            sm = min(1.0, NORMAL_SMS / (self.hardware.sm_count or 132))
            passes = 2.0
        elif op.variant == "low_latency":
            passes = LOCAL_PASSES
            staging = self._tables[op.kind, op.variant][0].floor_s + passes * op.message_bytes / bandwidth
            sm = min(1.0, staging / seconds)
        else:
            sm, passes = min(1.0, NCCL_SMS / (self.hardware.sm_count or 132)), NCCL_PASSES
        memory = min(1.0, passes * op.message_bytes / (bandwidth * seconds))
        return self._sheet.links_demand(op, seconds)._replace(sm=sm, memory=memory)

    def overlap_rates(self, variant: str) -> dict[str, float]:
        """Return measured rates of collectives beside compute, by kind."""
        return {
            kind: rate
            for (kind, of), rate in OVERLAP_RATES.items()
            if of == variant and ((kind, of) in self._tables or self._lender(kind, of) is not None)
        }

    def contention_pairs(self, variant: str) -> dict[tuple[str, str], float]:
        """Return measured rates of compute kinds beside collectives of a variant, on the SMs that those leave."""
        if variant != "normal":
            return {}
        sms = self.hardware.sm_count or 132
        left = (sms - NORMAL_SMS) / (sms - TRAINING_SMS * sms / 132)
        return {
            (kind, other): rate * left
            for kind, rate in BESIDE_EXCHANGE.items()
            for other in self.overlap_rates(variant)
        }

    def tag(self, op: Op) -> Tag:
        """Return where the figure comes from."""
        lender = self._lender(op.kind, op.variant)
        if lender is not None:
            return lender.tag(op)
        if (op.kind, op.variant) not in self._tables:
            return self._sheet.tag(op)
        near = self._near(op.kind, op.variant, op["ranks"])
        outside = self._outside(op.kind, op.variant, np.array([op.message_bytes]), op["ranks"])[0]
        if outside > 0 or self.is_carried(op.kind, op.variant):
            return "extrapolated"
        if op["ranks"] == near.ranks and op.message_bytes in near.bytes:
            return "measured"
        return "interpolated"

    def spread(self, kind: str, variant: str) -> float:
        """Return the relative error of a kind: that of an independent re-measurement; wider where a part of the table
        is another device's, or all of it."""
        lender = self._lender(kind, variant)
        if lender is not None:
            return lender.spread(kind, variant)
        if self.is_carried(kind, variant):
            return CARRIED_SPREAD.get(variant, CARRIED_SPREAD["normal"])
        borrowed = any(curve.borrowed for curve in self._tables.get((kind, variant), ()))
        return BORROWED_SPREAD if borrowed else SPREAD

    def is_carried(self, kind: str, variant: str) -> bool:
        """Whether all of a table is another device's."""
        curves = self._tables.get((kind, variant), ())
        return bool(self.carried_from or (curves and all(curve.borrowed and curve.bytes[0] > 0 for curve in curves)))

    def notes(self, collectives: Iterable[tuple[str, str, Tag]]) -> list[str]:
        """Return which of a step's (kind, variant, tag) nobody measured, and how far they may be off."""
        names: dict[str, list[str]] = {}
        for kind, variant, tag in sorted(collectives):
            if tag == "datasheet":
                took, spread = ("1.15", SHEET_SPREAD) if kind not in NCCL_KINDS else ("1.29", NCCL_SHEET_SPREAD)
                says = (
                    f"from the links in the data sheet of {self.hardware.name}, not measured; those that were measured "
                    f"take {took} times their data-sheet time (median), spread {spread:.0%}"
                )
            elif tag == "extrapolated" and (self._lender(kind, variant) or self).is_carried(kind, variant):
                holder = self._lender(kind, variant) or self
                giver = holder.carried_from or holder._tables[kind, variant][0].borrowed
                says = (
                    f"the tables of {giver}, scaled by both devices' links; such carrying misses by "
                    f"{self.spread(kind, variant):.0%} where both were measured, and what lies beyond the measured "
                    f"ranks or bytes by up to {EXTRAPOLATED_SPREAD:.0%} more"
                )
            elif tag == "extrapolated":
                says = (
                    "beyond the ranks, bytes or links that were measured; interval widened by up to "
                    f"{EXTRAPOLATED_SPREAD:.0%} (measured error of tables left out)"
                )
            else:
                continue
            names.setdefault(says, []).append(" ".join(filter(None, (kind, variant))))
        return [f"{', '.join(same)}: {says}" for says, same in names.items()]

    def draw(self, index: int) -> CollectiveTimes:
        """Return one draw: each kind shifted by its spread. Equal indices give equal draws."""
        normal = float(np.random.default_rng([index, 11]).normal())
        gap = max(0.0, self.kernel_gap_s + normal * min(KERNEL_GAP_SPREAD_S, self.kernel_gap_s))
        lent = self.lent.draw(index) if self.lent is not None else None
        return CollectiveTimes(self.hardware, self.curves_, self.reference, index, self.carried_from, gap, lent)

    def _shift(self, kind: str, variant: str) -> tuple[float, float]:
        """Return log(time / fit) of this draw where it was measured, and what is added where it was not."""
        if self.drawn is None:
            return 0.0, 0.0
        shared = float(np.random.default_rng([self.drawn, 13]).normal())
        if (kind, variant) not in self._tables:
            return 0.0, shared * (NCCL_SHEET_SPREAD if kind in NCCL_KINDS else SHEET_SPREAD)
        if kind in NCCL_KINDS and self.is_carried(kind, variant):
            seed = [self.drawn, 17]  # NCCL's carried tables miss together
        else:
            seed = [self.drawn, sorted(self._tables).index((kind, variant)), 7]
            seed += [crc32(self.carried_from.encode())] if self.carried_from else []
        own = float(np.random.default_rng(seed).normal())
        return own * self.spread(kind, variant), shared * EXTRAPOLATED_SPREAD

    def _near(self, kind: str, variant: str, ranks: float) -> Curve:
        return min(self._tables[kind, variant], key=lambda curve: abs(np.log2(curve.ranks / max(ranks, 1.0))))

    def _outside(self, kind: str, variant: str, size: FloatArray, ranks: float) -> FloatArray:
        """Return how far sizes [N] are from what was measured: 0 within it, 1 beyond its ranks or twice its bytes, and
        the octaves by which its link differs, 1 at most; links inside a node are a part of the error of carrying where
        all is carried (none of the carried tables that were measured crossed nodes on other links)."""
        table = self._tables[kind, variant]
        now, then = self._wire_s(kind, ranks), self._measured_wire_s(kind, ranks)
        is_part = self.carried_from and ranks <= min(self.hardware.domain_size, self.hardware.sheet.domain_size)
        octaves = abs(float(np.log2(now / then))) if now and then else 0.0
        octaves = max(0.0, octaves - CARRIED_OCTAVES) if is_part else octaves
        beyond = (size > 2 * self._near(kind, variant, ranks).bytes[-1]) | (
            not table[0].ranks <= ranks <= table[-1].ranks
        )
        return np.where(beyond, 1.0, min(1.0, octaves))


def _links(hardware: HardwareSpec) -> dict[str, float]:
    """Return the bandwidth of each link."""
    found = {"scale_up": hardware.scale_up, "scale_out": hardware.scale_out}
    return {name: float(link.bandwidth) for name, link in found.items() if link is not None}


def _latency_s(hardware: HardwareSpec, name: str) -> float:
    link = getattr(hardware, name)
    return (link.latency if link else None) or COLLECTIVE_FLOOR_S


def _wire_s(kind: str, ranks: float, hardware: HardwareSpec, bandwidths: Mapping[str, float]) -> float | None:
    """Return the seconds that a byte of a message takes on the busiest link of ``bandwidths``; None where one is
    missing that it needs."""
    shares = dict(zip(("scale_up", "scale_out"), link_shares(ranks, hardware), strict=True))
    needed = [link for link, share in shares.items() if share > 0]
    if any(link not in bandwidths for link in needed):
        return None
    return link_passes(kind) * max((shares[link] / bandwidths[link] for link in needed), default=0.0)
