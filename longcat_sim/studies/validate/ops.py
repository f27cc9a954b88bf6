"""Section ``ops``: held-out errors of the op times of every packaged profile, and of this machine's where it is fitted.

The errors were found when the profile was fitted: a random fifth, the largest sizes, and whole values of one size were
each left out of a fit of their own. They stand in the profile's ``fit:`` section.
"""

from __future__ import annotations

from collections.abc import Sequence

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.laws import LAWS
from longcat_sim.errors import UserError
from longcat_sim.specs.hardware import hardware_names, load_hardware
from longcat_sim.studies.validate.section import Row, Section

GPU_KINDS = ("gemm", "grouped_gemm", "mla_decode")
GPU_LIMITS = {"random": 0.04, "largest": 0.08, "dimension": 0.08}
CPU_LIMITS = {True: 0.08, False: 0.12}
"""Random fifth, p10 against p10: kinds bound by compute, and by memory (or 1.5 x the drift between blocks, if more)."""
COVERAGE = (0.85, 0.95)
MIN_POINTS = 200


def run(hardware: Sequence[str] = ()) -> Section:
    """Return the error table of every profile, or of these only; one that cannot be read is named in a note."""
    section = Section("ops", "Fitted op times against held-out measurements (mean absolute error)")
    pooled: dict[str, list[tuple[float, int]]] = {}
    by_kind: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for name in hardware or hardware_names():
        try:
            device = load_hardware(name)
            times = OpTimes.from_hardware(device)
        except UserError as error:  # a profile of the user's that another version wrote or fitted
            section.notes.append(f"left out: {error.faults[0]}")
            continue
        is_cpu, is_pooled = device.sm_count == 1, not times.provenance.get("backend")  # or tables would count twice
        for law in times.laws_.values():
            if law.transferred_from:
                section.notes.append(f"{name}: {' '.join(filter(None, law.key))} is that of {law.transferred_from}")
                continue
            for split, figures in law.errors_.items():
                drift = times.provenance.get("drift", {}).get(" ".join(filter(None, law.key)))
                limit = _limit(law.kind, split, is_cpu, drift or 0.0)
                coverage, count = figures["coverage"], int(figures["count"])
                note = f"median {figures['median']:.1%}, {count} points, 90 % interval holds {coverage:.0%}"
                if drift is not None:
                    note += f"; blocks differ by {drift:.0%}"
                section.rows.append(
                    Row(
                        f"{name} {' '.join(filter(None, law.key))} {split}",
                        "ratio",
                        figures["mape"],
                        error=figures["mape"],
                        limit=limit,
                        note=note,
                    )
                )
                if not is_pooled:
                    continue
                if law.kind in GPU_KINDS and split in GPU_LIMITS and not is_cpu and not device.has_own_kernels:
                    by_kind.setdefault((law.kind, split), []).append((figures["mape"], count))
                if split in ("fitted", "random p10"):
                    continue
                where = "interpolated" if split == "random" else "extrapolated"
                group = f"{'cpu' if is_cpu else 'gpu campaign' if device.has_own_kernels else 'gpu tables'}, {where}"
                pooled.setdefault(group, []).append((coverage, count))
    for (kind, split), parts in sorted(by_kind.items()):
        mape, count = _mean(parts)
        name, note = f"gpu tables, {kind}: {split}", f"{len(parts)} laws, {count} points"
        section.rows.append(Row(name, "ratio", mape, error=mape, limit=GPU_LIMITS[split], note=note))
    for group, parts in pooled.items():
        held, count = _mean(parts)
        judged = COVERAGE[0] <= held <= COVERAGE[1] if count >= MIN_POINTS else None
        note = f"{count} points; expected 85-95 %"
        section.rows.append(
            Row(f"{group}: held by 90 % interval", "ratio", held, error=held - 0.9, passed=judged, note=note)
        )
    section.notes.append(
        "random: a fifth of the sizes left out, at random; random p10: the same, 10th percentiles; largest, dimension: "
        "the largest sizes or all of one value left out; fitted: on the very points"
    )
    if not section.rows:
        section.skipped = f"no fit in {', '.join(hardware) or 'any profile'}"
    return section


def _mean(parts: list[tuple[float, int]]) -> tuple[float, int]:
    """Return the mean of (value, points), each weighted by its points, and the points of all."""
    count = sum(points for _, points in parts)
    return sum(value * points for value, points in parts) / max(1, count), count


def _limit(kind: str, split: str, is_cpu: bool, drift: float) -> float | None:
    if is_cpu:
        if split != "random p10":
            return None
        limit = CPU_LIMITS[LAWS[kind].compute_bound]
        return limit if LAWS[kind].compute_bound else max(limit, 1.5 * drift)
    return GPU_LIMITS.get(split) if kind in GPU_KINDS else None
