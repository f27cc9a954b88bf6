"""Section ``transfer``: op times of a system that no fit has seen, predicted from the fits of two others.

Each source's law is scaled by the data sheets of source and target (peak, bandwidth, SMs, cache), and the predictions
are averaged in the logarithm, weighted by the inverse square of the distance: kernels are written for an architecture,
so a source of another one says little where one of the same is there. They are compared with the target's own fit at
sizes that were measured there. Data sheets are used; no figure of the target's fit is.

What Blackwell's tables miss by is its kernels, not the way of carrying: 20.8 % as here, 21.3 % with half of each local
correction, 22.3 % by the laws alone; by the tables of SGLang alone 17.9 %, of vLLM 33.8 %, the fastest of three engines
20.7 %, the median of their three predictions 19.9 %; kernels that have one name on all three GPUs 13.9 % over 23 laws
(2026-11-26, no command repeats these). Kernels of three engines on one and the same GPU differ by 13 to 31 %
(`tests/oracle/test_engines_kernels.py`). Each case says what would be left if one factor per kind were known, which
only the target could tell. Absorption in fp8 is another product altogether: the tables' kernel quantises its inputs on
a Hopper and multiplies in bf16 on a Blackwell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.answer import Key
from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.lenders import distance, nearest, serves
from longcat_sim.calibration.transfer import device_of
from longcat_sim.capacity.samples import kinds_of
from longcat_sim.errors import SpecError, UserError
from longcat_sim.ops.op import FloatArray
from longcat_sim.specs.hardware import load_hardware, readable_hardware
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.validate.section import Row, Section

CASES: tuple[tuple[tuple[str, str], str], ...] = (
    (("a100-sxm", "h200-sxm"), "h100-sxm"),
    (("h100-sxm", "h200-sxm"), "b200-sxm"),
)
LIMIT = 0.12
"""Median |error| over all op kinds of a case."""
STEP = "longcat-flash-h800-decode"
"""Scenario of which the op time is compared on every device."""
POINTS = 400
"""Sizes compared per law."""
NEAR = 0.05
"""Added to a source's expected error, so that an equal device does not count for ever. Assumed."""


def run(hardware: Sequence[str] = ()) -> Section:
    """Return the transfer table: median |error| per kind, and over the kinds of a case; of these targets only."""
    section = Section("transfer", "Op times of an unseen system, predicted from two others (median |error|)")
    for sources, target in CASES:
        if hardware and target not in hardware:
            continue
        name = f"{' + '.join(sources)} -> {target}"
        try:
            rows = transfer_errors(sources, target)
        except UserError as error:  # a profile of the user's that another version wrote or fitted
            section.notes.append(f"{name}: left out: {error.faults[0]}")
            continue
        for label, errors in rows.items():
            section.rows.append(_row(f"{name}: {label}", [errors], None))
        if rows:
            row = _row(f"{name}: all kinds", list(rows.values()), LIMIT)
            left = np.median([spread_left(errors) for errors in rows.values()])
            section.rows.append(replace(row, note=f"{row.note}; {left:.1%} if a factor of each kind were known"))
            for source in sources:
                ratio = carried_step(source, target)
                label = f"decode step on {target}, laws of {source} over own fit"
                section.rows.append(Row(label, "ratio", ratio, error=ratio - 1))
        else:
            section.notes.append(f"{name}: no kind is fitted on all three")
    for target in measured_devices():
        if hardware and target not in hardware:
            continue
        section.rows.append(_row(f"nearest device -> {target}: all kinds", list(lent_errors(target).values()), None))
        for name, ratio in zip(("nearest device", "data sheet alone"), step_ratios(target), strict=True):
            section.rows.append(Row(f"decode step on {target}, {name} over own fit", "ratio", ratio, error=ratio - 1))
    if not section.rows:
        section.skipped = f"{', '.join(hardware)}: no fit of published tables to compare with"
    return section


def _row(name: str, errors: list[FloatArray], limit: float | None) -> Row:
    """Return the median over kinds of the median |error|; the note has the sign."""
    median = float(np.median([np.median(np.abs(each)) for each in errors]))
    signed = float(np.median([np.median(each) for each in errors]))
    sizes = f"{len(errors[0])} sizes" if len(errors) == 1 else f"{len(errors)} kinds"
    return Row(name, "ratio", median, error=median, limit=limit, note=f"{sizes}, signed {signed:+.1%}")


def spread_left(errors: FloatArray) -> float:
    """Return the median |error| that is left of predicted / measured - 1 at the best factor: half of the shortest
    interval that holds half of the logs."""
    logs = np.sort(np.log1p(errors))
    half = len(logs) // 2
    return float(np.expm1((logs[half:] - logs[: len(logs) - half]).min() / 2))


def carried_step(source: str, target: str) -> float:
    """Return the op time of a LongCat-Flash decode step on ``target`` by the laws of ``source`` alone, over that by its
    own fit; kinds that both have."""
    hardware = load_hardware(target)
    laws = [OpTimes.from_hardware(load_hardware(name)).laws_ for name in (source, target)]
    known = {key[0] for key in laws[0]} & {key[0] for key in laws[1]}
    case = scenario(STEP, {"hardware": target})
    theirs, own = (
        sum(seconds for kind, (_, seconds) in kinds_of(case, OpTimes(hardware, found)).items() if kind in known)
        for found in laws
    )
    return theirs / own


def measured_devices() -> list[str]:
    """Return the profiles with at least five laws of their own."""
    found = []
    for name, hardware in readable_hardware():
        laws = (hardware.fit or {}).get("laws", [])
        if (
            hardware.architecture
            and not hardware.has_own_kernels
            and not (hardware.fit or {}).get("backend")
            and sum("transferred_from" not in law for law in laws) >= 5
        ):
            found.append(name)
    return found


def lent_errors(target: str) -> dict[str, FloatArray]:
    """Return predicted / measured - 1 at measured sizes, per kind, as if the kind had not been measured on ``target``.

    Its law is then that of the nearest other device.
    """
    hardware = load_hardware(target)
    found = {}
    for key, law, points, truth in _measured(OpTimes.from_hardware(hardware)):
        lent = nearest(key, hardware)
        if lent is not None and lent.law.dtype == law.dtype:
            device = lent.scaled_to(hardware, device_of(hardware, law.dtype))
            found[" ".join(filter(None, key))] = lent.law.table(device).many(points) / truth - 1
    return found


def step_ratios(target: str) -> tuple[float, float]:
    """Return the op time of a LongCat-Flash decode step on ``target`` by lent laws and by its data sheet alone, over
    that by its own fit; kinds that its own fit has."""
    hardware = load_hardware(target)
    case = scenario(STEP, {"hardware": target})
    own = kinds_of(case, OpTimes.from_hardware(hardware))
    known = {kind for kind, (tag, seconds) in own.items() if tag != "datasheet" and seconds > 0}
    known &= {key[0] for key in OpTimes.from_hardware(hardware).laws_}
    total = sum(own[kind][1] for kind in known)
    ratios = []
    for borrows in (True, False):
        found = kinds_of(case, OpTimes(hardware, {}, borrows=borrows))
        ratios.append(sum(found[kind][1] for kind in known) / total)
    return ratios[0], ratios[1]


def transfer_errors(sources: Sequence[str], target: str) -> dict[str, FloatArray]:
    """Return predicted / measured - 1 at measured sizes of the target, per kind and dtype that a source has."""
    hardware = load_hardware(target)
    own = OpTimes.from_hardware(hardware)
    others = [OpTimes.from_hardware(load_hardware(name)) for name in sources]
    found = {}
    for key, _, points, truth in _measured(own):
        givers = [
            (law, times.hardware)
            for times in others
            for law in times.laws_.values()
            if (law.kind, law.dtype) == key[:2] and serves(law, key[2], times.laws_.values())
        ]
        total, weights = np.zeros(len(truth)), 0.0
        for giver, lender in givers:
            try:
                carried = giver.table(device_of(hardware, giver.dtype)).many(points)
            except SpecError:
                continue
            weight = 1.0 / (NEAR + distance(hardware, giver, lender)) ** 2
            total += weight * np.log(carried)
            weights += weight
        if weights:
            found[" ".join(filter(None, key))] = np.exp(total / weights) / truth - 1
    return found


def _measured(times: OpTimes) -> Iterator[tuple[Key, FittedLaw, list[FloatArray], FloatArray]]:
    """Yield each law of a device's own measurements, with sizes that were measured and their times."""
    for key, law in times.laws_.items():
        if not law.transferred_from:
            points = measured_points(law)
            yield key, law, points, law.table(law.reference).many(points)


def measured_points(law: FittedLaw) -> list[FloatArray]:
    """Return up to ``POINTS`` sizes of the law's grid that were measured [coordinates][N]."""
    cells = np.argwhere(law.measured_)
    rows = np.random.default_rng(0).permutation(len(cells))[:POINTS]
    return [axis[cells[rows, i]] for i, axis in enumerate(law.axes_)]
