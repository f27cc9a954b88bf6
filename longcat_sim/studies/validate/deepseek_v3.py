"""DeepSeek-V3 on H800: the published decode and prefill rates of its profile, predicted by the fitted H800 profile."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.ops.op import OpTimesLike
from longcat_sim.simulation.step import simulate_draws, simulate_step
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.validate.longcat_report import h800_times
from longcat_sim.studies.validate.section import Row, Section
from longcat_sim.studies.validate.targets import targets

LIMIT = 0.10


def run(op_times: OpTimesLike | None = None, *, draws: int = 32, **_: Any) -> Section:
    """Return the section; nothing is fitted to its rows."""
    times = op_times or h800_times()
    published = targets("deepseek-v3")["profile"]
    section = Section("deepseek_v3", "DeepSeek-V3 on H800: decode EP128 and prefill EP32, two micro-batches")
    for phase in ("decode", "prefill"):
        case = scenario(f"deepseek-v3-h800-{phase}")
        assert case.step is not None
        tokens = case.step.sequences_per_gpu if case.step.phase == "decode" else case.step.tokens_per_gpu
        result = simulate_step(case, times)
        drawn = tokens / simulate_draws(case, times, draws).step_s
        low, centre, high = np.quantile(drawn, (0.05, 0.5, 0.95))  # the figures that ``simulate`` prints
        section.rows.append(
            Row(
                f"{phase}: tokens/s per GPU", "1/s", float(centre),
                published[f"{phase}_tokens_per_s_per_gpu"], limit=LIMIT, low=float(low), high=float(high),
                note=f"step {result.step_s * 1e3:.1f} ms",
            )
        )  # fmt: skip
        serial = simulate_step(case.what_if({"deployment.overlap": "none"}), times).step_s
        section.rows.append(
            Row(f"{phase}: step with two micro-batches over without", "", result.step_s / serial, note="below 1: gain")
        )
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in result.breakdown.parts().items())
        section.notes.append(f"{phase} step, ms: {parts}")
    return section
