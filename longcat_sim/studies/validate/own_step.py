"""Section ``own-step``: decode and prefill steps of the executable model on this machine, predicted from its ops.

No time of a step enters the fit. What a step adds to its ops is the host's work between kernels; on a CPU that work is
inside the ops' own times, which are measured with caches as cold as a step leaves them (``profiling.timing``). A shared
CPU is faster in one minute than in the next: each op is predicted at the pace that the machine had while the steps ran,
told by probes that know neither (``profiling.pace``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longcat_sim.calibration import OpTimes
from longcat_sim.errors import MeasurementError
from longcat_sim.ops.graph import LayerLoad
from longcat_sim.ops.op import OpTimesLike
from longcat_sim.profiling.pace import powers_of, slowed, sort_of
from longcat_sim.profiling.steps import POINTS, Point
from longcat_sim.profiling.suites import step_ops
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.specs.hardware import readable_hardware
from longcat_sim.specs.model import ModelSpec, model_spec
from longcat_sim.studies.validate.section import Row, Section, median, worst

MODEL = "longcat-cpu-64e"
MEDIAN_LIMIT, WORST_LIMIT = 0.06, 0.15


def predict_s(
    times: OpTimesLike, spec: ModelSpec, step: StepMeasurement, dtype: str, pace: Mapping[str, Any] | None = None
) -> float:
    """Return the predicted time of a step: the sum of its ops, with the experts' recorded load.

    ``pace`` is that of the ops (``probe_s``, and each sort's ``sensitivity``): at the step's they take longer or less.
    """
    load = LayerLoad(step.received, step.received, step.active)
    ops = step_ops(spec, step.phase, step.sequences, step.queries, step.context, dtype, load)
    if dtype != "fp32":  # a GPU's step is a graph: the host has done its work before
        ops = [item for item in ops if item.kind != "host"]
    if not pace:
        return sum(times.seconds(item) for item in ops)
    factors = {
        sort: slowed(step.pace_s, pace["probe_s"], powers_of(sort, pace["sensitivity"])) for sort in map(sort_of, ops)
    }
    return sum(times.seconds(item) * factors[sort_of(item)] for item in ops)


def compare(
    times: OpTimesLike, spec: ModelSpec, steps: Sequence[StepMeasurement], dtype: str = "fp32",
    pace: Mapping[str, Any] | None = None,
) -> list[Row]:  # fmt: skip
    """Return one row per step: predicted (``predict_s``) beside measured, with the drift that its pace leaves."""
    rows = []
    for step in steps:
        size = f"{step.sequences} x {step.context - 1 if step.phase == 'decode' else step.context} tokens"
        rows.append(
            Row(
                f"{step.phase} {size}", "ms", predict_s(times, spec, step, dtype, pace) * 1e3,
                step.median_s * 1e3, note=f"blocks differ by {step.drift:.0%}",
            )
        )  # fmt: skip
    return rows


def summary_rows(rows: Sequence[Row], steps: Sequence[StepMeasurement]) -> list[Row]:
    """Return the median and the worst error with their limits."""
    drift = sorted(step.drift for step in steps)[len(steps) // 2]
    limit = max(MEDIAN_LIMIT, 1.5 * drift)
    middle, most = median(rows), worst(rows)
    return [
        Row("median |error|", "", middle, error=middle, limit=limit, note=f"6 %, or 1.5 x the drift of {drift:.0%}"),
        Row("worst |error|", "", most, error=most, limit=max(WORST_LIMIT, 3 * drift)),
    ]


def fit_of(device: str) -> tuple[OpTimes | None, list[str]]:
    """Return the newest fit to measurements of a device, by the name that it gives itself, and which one it is."""
    measured = [(name, spec) for name, spec in readable_hardware() if (spec.fit or {}).get("measured_on") == device]
    measured.sort(key=lambda each: str((each[1].fit or {}).get("date", "")), reverse=True)
    notes = []
    for name, spec in measured:
        try:
            times = OpTimes.from_hardware(spec)
        except MeasurementError as error:
            notes.append(f"left out: {error.faults[0]}")
            continue
        others = f", the newest of {', '.join(sorted(each for each, _ in measured))}" if len(measured) > 1 else ""
        return times, [*notes, f"predicted by the fit of {name}{others}"]
    return None, notes


def run(
    times: OpTimes | None = None, *, model: str = MODEL, device: Any = None, points: Sequence[Point] = POINTS,
    budget_s: float = 30.0, **_: Any,
) -> Section:  # fmt: skip
    """Measure steps of ``model`` here and return them beside their prediction.

    ``times`` default to the fit of this machine's measurements, the newest where several profiles hold one.
    """
    import torch

    from longcat_sim.model import LongcatFlash
    from longcat_sim.profiling.environment import here
    from longcat_sim.profiling.steps import measure_steps

    place = torch.device(device or "cpu")
    section = Section("own-step", f"Steps of {model} on this machine, predicted from op times alone")
    if times is None:
        times, notes = fit_of(here(place).device)
        section.notes += notes
        if times is None:
            section.skipped = (
                "no profile is fitted to this machine: run `quickstart`, or `profile --out m.jsonl` and then "
                "`calibrate m.jsonl --name mine`"
            )
            return section
    dtype, name = (torch.float32, "fp32") if place.type == "cpu" else (torch.bfloat16, "bf16")
    spec = model_spec(model)
    steps = measure_steps(LongcatFlash(spec, device=place, dtype=dtype), model, points, budget_s=budget_s)
    pace = times.provenance.get("pace")
    section.rows = compare(times, spec, steps, name, pace)
    if pace and steps[0].pace_s:
        ratio = pace["probe_s"][0] / steps[0].pace_s[0]
        section.notes.append(f"at the pace of these steps, {ratio:.2f} of that at which the ops were measured")
    section.rows += summary_rows(section.rows, steps)
    return section
