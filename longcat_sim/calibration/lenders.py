"""Kinds of op that nobody measured on a device take the law of the device on which they are likeliest to be alike.

Over a LongCat-Flash decode step on ten GPUs whose own times are known, a data sheet's roofline alone comes to 43 to
86 % of them, lent laws to 62 to 114 % (`validate --section transfer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from longcat_sim.calibration.answer import Key
from longcat_sim.calibration.collective_file import read_collectives
from longcat_sim.calibration.collectives import CollectiveTimes
from longcat_sim.calibration.fit_file import read_fit
from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.laws import Device
from longcat_sim.calibration.transfer import device_of
from longcat_sim.errors import MeasurementError, SpecError
from longcat_sim.specs.hardware import HardwareSpec, readable_hardware

OTHER_ARCHITECTURE = 0.18
OCTAVE_OF_BALANCE = 0.11
OCTAVE_OF_BANDWIDTH = 0.03
"""Median |error| (log) that carrying a law adds: for another generation of cores, per octave of peak over bandwidth,
and per octave of bandwidth. Least squares over the 70 pairs of nine GPUs with tables (2026-11-24, correlation 0.87; no
command repeats it). They only rank lenders: intervals have errors of their own (``transfer_spread``)."""
REACH = 0.7
"""Expected error beyond which nothing is lent: a data sheet's roofline alone misses by as much. A GPU is further than
that from a CPU."""
_read: dict[str, tuple[Any, list[FittedLaw]]] = {}


class Lent(NamedTuple):
    """A law of another device."""

    law: FittedLaw
    lender: HardwareSpec

    def scaled_to(self, hardware: HardwareSpec, device: Device) -> Device:
        """Return the figures with which the law is asked. Another maker's cores and caches are not SMs and their L2:
        there the lender's stand."""
        if hardware.maker == self.lender.maker:
            return device
        return device._replace(sm_count=self.law.reference.sm_count, cache_bytes=self.law.reference.cache_bytes)


def distance(hardware: HardwareSpec, law: FittedLaw, lender: HardwareSpec) -> float:
    """Return the median |error| (log) to expect of a law of ``lender`` on ``hardware``.

    Figures are those of the data sheet: a what-if scales the law of the same lender, so that it has no jumps.

    Raises:
        SpecError: ``hardware`` has no peak for the law's dtype.
    """
    try:
        here = device_of(hardware.sheet, law.dtype)
    except SpecError:  # a what-if may add the type
        here = device_of(hardware, law.dtype)
    there = law.reference
    balance = (here.peak / here.bandwidth) / (there.peak / there.bandwidth)
    return (
        OTHER_ARCHITECTURE * (not hardware.architecture or hardware.architecture != lender.architecture)
        + OCTAVE_OF_BALANCE * abs(math.log2(balance))
        + OCTAVE_OF_BANDWIDTH * abs(math.log2(here.bandwidth / there.bandwidth))
    )


def serves(law: FittedLaw, variant: str, laws: Iterable[FittedLaw]) -> bool:
    """Return whether ``law`` is that of a kernel variant on a device with ``laws``: of its name, or the one for all
    that have no law of their own."""
    return law.variant == variant or (not law.variant and (law.kind, law.dtype, variant) not in {o.key for o in laws})


def nearest(key: Key, hardware: HardwareSpec) -> Lent | None:
    """Return the law of ``key``'s kind of the nearest device, of its variant and dtype where one has them."""
    kind, dtype, variant = key
    best: tuple[tuple[bool, bool, float, str], Lent] | None = None
    for lender in _lenders():
        if lender.name == hardware.name:
            continue
        laws = [law for law in _laws_of(lender) if law.kind == kind and not law.transferred_from]
        for law in laws:
            try:
                apart = distance(hardware, law, lender)
            except SpecError:  # no peak for that type on this device
                continue
            rank = (law.dtype != dtype, not serves(law, variant, laws), apart, lender.name)
            if apart <= REACH and (best is None or rank < best[0]):
                best = rank, Lent(law, lender)
    return best[1] if best else None


def lent_collectives(hardware: HardwareSpec) -> CollectiveTimes | None:
    """Return the tables of collectives of the nearest devices on the links of ``hardware``, the nearest first and each
    with the next for what it lacks; None where no device is near.

    Near is a device of the same maker whose links join as many, neither more than an octave faster or slower. Links
    are those of the data sheet: a what-if scales the tables of the same lender. Beyond an octave a data sheet answers.
    """
    links = _links_of(hardware.sheet)
    ranked = []
    for _, lender in readable_hardware():
        if lender.name == hardware.name or lender.maker != hardware.maker or lender.has_own_kernels:
            continue
        (up, out, joined), (their_up, their_out, they_join) = links, _links_of(lender)
        octaves = abs(math.log2(up / their_up)), abs(math.log2(out / their_out))
        if joined == they_join and max(octaves) <= 1.0 and (lender.fit or {}).get("collectives"):
            ranked.append((sum(octaves), lender.architecture != hardware.architecture, lender.name, lender))
    found: CollectiveTimes | None = None
    for *_, lender in sorted(ranked, key=lambda row: row[:3], reverse=True):
        try:
            tables = read_collectives(lender)
        except MeasurementError:  # it answers for itself when it is asked
            continue
        if tables is not None:
            own = [curve for curve in tables.curves_ if not tables.is_carried(curve.kind, curve.variant)]
            found = CollectiveTimes(hardware, own, tables.reference, carried_from=lender.name, lent=found)
    return found


def _links_of(hardware: HardwareSpec) -> tuple[float, float, int]:
    """Return (scale-up and scale-out bandwidth, devices that the scale-up link joins); what is missing is next to none
    and near no other's."""
    up, out = hardware.scale_up, hardware.scale_out
    return up.bandwidth if up else 1.0, out.bandwidth if out else 1.0, hardware.domain_size


def _lenders() -> Iterator[HardwareSpec]:
    for _, found in readable_hardware():
        has_laws = found.architecture and found.fit and found.fit.get("laws")  # a CPU names no architecture
        if has_laws and not found.has_own_kernels and not (found.fit or {}).get("backend"):
            yield found  # what a user fitted to another engine's kernels changes no other device


def _laws_of(lender: HardwareSpec) -> list[FittedLaw]:
    """Return the laws of a profile, read once; a profile that was fitted again has another ``fit``."""
    kept = _read.get(lender.name)
    if kept is None or kept[0] is not lender.fit:
        try:
            laws = list(read_fit(lender)[0].values())
        except MeasurementError:  # of another version: it answers for itself when it is asked, and lends nothing
            laws = []
        kept = _read[lender.name] = lender.fit, laws
    return kept[1]
