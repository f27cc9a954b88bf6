"""Limits of overlap with the contention law on: where overlapping makes a step longer, and by how much.

With the law off these cannot happen (tests check it); with it on they can, and each is listed with its size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.ops.op import OpTimesLike
from longcat_sim.simulation.step import step_seconds_many
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.validate.longcat_report import h800_times
from longcat_sim.studies.validate.section import Row, Section

BATCHES = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])


def _seconds(case: Scenario, times: OpTimesLike, overlap: str, contention: str = "max_min") -> Any:
    changed = case.what_if({"deployment.overlap": overlap})
    context = case.step.context_tokens if case.step is not None and case.step.phase == "decode" else 4096.0
    return step_seconds_many(changed, times, BATCHES, context, contention=contention)


def run(op_times: OpTimesLike | None = None, **_: Any) -> Section:
    """Return the section: overlap over none by batch, for both models, and reversals with faster links."""
    times = op_times or h800_times()
    section = Section("limits", "Overlap with contention: step over the serial step, by sequences per GPU")
    for name, overlaps in (
        ("longcat-flash-h800-decode", ("sbo", "sbo_engine", "tbo")),
        ("deepseek-v3-h800-decode", ("sbo", "tbo")),
    ):
        case = scenario(name)
        serial = _seconds(case, times, "none")
        for overlap in overlaps:
            with_law = _seconds(case, times, overlap) / serial
            free = _seconds(case, times, overlap, "off") / serial
            for batch, ratio, bare in zip(BATCHES, with_law, free, strict=True):
                limit = 1e-9 if overlap == "sbo" else None  # never slower than none with the law off
                note = f"{bare:.3f} without contention" + ("; overlap LOSES" if ratio > 1 else "")
                section.rows.append(
                    Row(
                        f"{case.model.name or name} {overlap} at {batch:g}", "of none", float(ratio),
                        error=float(max(0.0, bare - 1)) if limit else None, limit=limit, note=note,
                    )
                )  # fmt: skip
    losing = [row for row in section.rows if row.predicted > 1]
    section.notes.append(
        "reversals: " + ("; ".join(f"{row.quantity} {row.predicted - 1:+.1%}" for row in losing) or "none")
    )
    return section
